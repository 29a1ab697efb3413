"""The models in memory: reads their weights between steps, and makes room for others. Knows no calls."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from mlx_mcp.core.cache.manager import KvCacheManager
from mlx_mcp.core.cache.prefixes import PrefixCache
from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.ports import Flight, LoadedModel, LoadProgress, ModelLoader, PreparedModel
from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import SlotPool
from mlx_mcp.core.steps import Step
from mlx_mcp.engine.awaited import Memory, Place, PrefixComputing
from mlx_mcp.engine.messages import Failed, Loaded, Loading
from mlx_mcp.errors import MlxMcpError, ModelError
from mlx_mcp.stats import ModelStats


@dataclass
class Resident:
    """A model in memory, its scheduler, and the step that is being computed."""

    model: LoadedModel
    scheduler: Scheduler
    prepared: PreparedModel  # what it was loaded from
    asked_for: bool = False  # whether a user had it loaded, rather than a call that needed it
    ttl_s: float | None = None  # how long it stays without a call; None for as long as others leave it room
    began_at: float = 0.0  # when its weights began to be read
    since: float = 0.0  # when it was loaded
    used_at: float = 0.0
    closing: bool = False  # whether it takes no further calls, since another model's turn has come
    step: Step | None = None
    flight: Flight | None = None

    @property
    def pinned(self) -> bool:
        """Whether it is never unloaded to make room."""
        return bool(self.prepared.options.pinned)

    @property
    def expires_at(self) -> float | None:
        """When it is unloaded if nobody uses it until then."""
        return None if self.ttl_s is None else self.used_at + self.ttl_s

    @property
    def has_work(self) -> bool:
        """Whether a sequence has not ended, or the tokens of a step were not collected."""
        return self.scheduler.has_work or self.flight is not None

    def stats(self, now: float) -> ModelStats:
        """What is told of it."""
        idle_s = 0.0 if self.has_work else now - self.used_at
        calls = len(self.scheduler.running) + self.scheduler.num_waiting
        token_bytes = self.model.runner.cost.token_bytes
        return ModelStats(self.model.weights_bytes, token_bytes, idle_s, calls, self.pinned)

    def awaits(self, sequence: Sequence) -> PrefixComputing | Place | Memory | None:
        """What a sequence waits for; None if it runs."""
        if sequence.slot is not None:
            return None
        scheduler = self.scheduler
        if scheduler.cache is not None and scheduler.cache.is_waiting(sequence):
            return PrefixComputing()
        if len(scheduler.running) >= scheduler.limits.max_running:
            return Place()
        return Memory(scheduler.pool.alone_bytes(sequence.num_tokens + 1))


@dataclass
class PendingLoad:
    """A model whose weights are being read, one slice in each step."""

    prepared: PreparedModel
    slices: Generator[LoadProgress, None, LoadedModel]
    began_at: float
    asked_for: bool = False
    unloaded: list[PreparedModel] = field(default_factory=list)  # went for it, though a user had asked for them


@dataclass
class Residents:
    """The models in memory, and those that are being read."""

    loader: ModelLoader
    limits: Limits
    max_weights_bytes: int
    cache: PrefixCache
    sharing: Sharing
    ttl_s: float | None = None  # of models that have none of their own
    by_name: dict[str, Resident] = field(default_factory=dict)  # least recently used first
    loads: dict[str, PendingLoad] = field(default_factory=dict)

    @property
    def weights_bytes(self) -> int:
        """The bytes of the weights in memory."""
        return sum(resident.model.weights_bytes for resident in self.by_name.values())

    @property
    def has_work(self) -> bool:
        """Whether weights are being read, or a sequence has not ended."""
        return bool(self.loads) or any(resident.has_work for resident in self.by_name.values())

    @property
    def expire(self) -> bool:
        """Whether a model is unloaded if nobody uses it for some time."""
        return any(resident.ttl_s is not None for resident in self.by_name.values())

    def use(self, name: str, now: float) -> Resident | None:
        """The model of that name, which becomes the most recently used; None if it is not in memory."""
        resident = self.by_name.pop(name, None)
        if resident is not None:
            self.by_name[name] = resident
            resident.used_at = now
        return resident

    def check_fits(self, prepared: PreparedModel) -> None:
        """Refuse a model for which there would not be room if all others were unloaded that may be.

        Raises:
            ModelError: with the figures.
        """
        need, limit, name = prepared.weights_bytes, self.max_weights_bytes, prepared.name
        if need > limit:
            raise ModelError(
                f"The weights of {name!r} take {need / 1e9:.1f} GB, more than the {limit / 1e9:.1f} GB that models may "
                "use. Choose a smaller or more strongly quantized model, or raise max_weights_bytes."
            )
        pinned = [resident for resident in self.by_name.values() if resident.pinned]
        kept = sum(resident.model.weights_bytes for resident in pinned)
        if kept + need > limit:
            names = ", ".join(repr(resident.model.name) for resident in pinned)
            raise ModelError(
                f"The weights of {name!r} take {need / 1e9:.1f} GB, and beside the pinned models ({names}, "
                f"{kept / 1e9:.1f} GB) there are {(limit - kept) / 1e9:.1f} GB. Unload one of these (unload_model), or "
                "raise max_weights_bytes."
            )

    def lacking_bytes(self, prepared: PreparedModel) -> int:
        """How many bytes of weights have to go before a model can be loaded; none or fewer if there is room."""
        pending = sum(load.prepared.weights_bytes for load in self.loads.values())
        return self.weights_bytes + pending + prepared.weights_bytes - self.max_weights_bytes

    def begin_load(self, prepared: PreparedModel, asked_for: bool, unloaded: list[PreparedModel], now: float) -> None:
        """Begin to read a model's weights, for which there is room."""
        slices = self.loader.materialise(prepared)
        self.loads[prepared.name] = PendingLoad(prepared, slices, now, asked_for, unloaded)

    def unload(self, name: str) -> None:
        """Forget a model that nobody uses; its weights go with the last reference to them."""
        assert not self.by_name[name].has_work, f"{name!r} has work"
        del self.by_name[name]

    def read_slices(self) -> list[tuple[str, Loading | Loaded | Failed]]:
        """Read one slice of every model that is being read; returns by name the event for those who wait for it.

        A load that has failed stays among `loads` for its caller to see to.
        """
        told = []
        for name, pending in list(self.loads.items()):
            event = self._read_slice(pending)
            if isinstance(event, Loaded):
                del self.loads[name]
            told.append((name, event))
        return told

    def clear(self) -> None:
        """Unload every model."""
        self.by_name.clear()
        self.loads.clear()

    def _read_slice(self, pending: PendingLoad) -> Loading | Loaded | Failed:
        try:
            return Loading(next(pending.slices))
        except StopIteration as end:
            model: LoadedModel = end.value
            own, prepared = pending.prepared.options.ttl_s, pending.prepared
            ttl_s = self.ttl_s if own is None else own
            resident = Resident(model, self._scheduler(model), prepared, pending.asked_for, ttl_s, pending.began_at)
            self.by_name[model.name] = resident
            return Loaded(model)
        except MlxMcpError as error:
            return Failed(error)
        except Exception as error:  # MLX's or a model's: it must not end the thread under the rows of the others
            name = pending.prepared.name
            told = f"Loading {name!r} failed: {error!r}. Call again, or choose another model (list_models shows them)."
            return Failed(ModelError(told))

    def _scheduler(self, model: LoadedModel) -> Scheduler:
        """Make a scheduler with the model's cache manager, or without one if nothing of the model can be reused."""
        slots, layout, cache = SlotPool(self.cache.pool.ledger, model.runner.cost), model.runner.layout, None
        limits = self.limits.reading(model.prefill)
        if not layout.refused:
            chunk_tokens = limits.chunk_tokens
            cache = KvCacheManager(self.cache, slots, layout, model.fingerprint, chunk_tokens, self.sharing)
        return Scheduler(limits, slots, cache)
