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
from mlx_mcp.errors import CapacityError, MlxMcpError, ModelError

BUSY_RETRY_S = 15  # a call of another model usually ends within that time


@dataclass
class Resident:
    """A model in memory, its scheduler, and the step that is being computed."""

    model: LoadedModel
    scheduler: Scheduler
    step: Step | None = None
    flight: Flight | None = None

    @property
    def has_work(self) -> bool:
        """Whether a sequence has not ended, or the tokens of a step were not collected."""
        return self.scheduler.has_work or self.flight is not None

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


@dataclass
class Residents:
    """The models in memory, and those that are being read."""

    loader: ModelLoader
    limits: Limits
    max_weights_bytes: int
    cache: PrefixCache
    sharing: Sharing
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

    def use(self, name: str) -> Resident | None:
        """The model of that name, which becomes the most recently used; None if it is not in memory."""
        resident = self.by_name.pop(name, None)
        if resident is not None:
            self.by_name[name] = resident
        return resident

    def load(self, prepared: PreparedModel) -> None:
        """Begin to read a model's weights, and unload idle models for it. Nothing is done if that is under way.

        Raises:
            ModelError: the model would not fit alone.
            CapacityError: models that are in use or being read take the room.
        """
        if prepared.name not in self.loads:
            self._make_room(prepared)
            self.loads[prepared.name] = PendingLoad(prepared, self.loader.materialise(prepared))

    def read_slices(self) -> list[tuple[str, Loading | Loaded | Failed]]:
        """Read one slice of every model that is being read; returns by name the event for those who wait for it."""
        told = []
        for name, pending in list(self.loads.items()):
            event = self._read_slice(pending)
            if not isinstance(event, Loading):
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
            self.by_name[model.name] = Resident(model, self._scheduler(model))
            return Loaded(model)
        except MlxMcpError as error:
            return Failed(error)
        except Exception as error:  # MLX's or a model's: it must not end the thread under the rows of the others
            return Failed(ModelError(f"Loading {pending.prepared.name!r} failed: {error!r}."))

    def _make_room(self, prepared: PreparedModel) -> None:
        """Unload idle models, the least recently used first, until the new one's weights fit.

        Raises:
            ModelError: the new one would not fit alone.
            CapacityError: models that are in use or being read take the room.
        """
        need, limit = prepared.weights_bytes, self.max_weights_bytes
        if need > limit:
            raise ModelError(
                f"The weights of {prepared.name!r} take {need / 1e9:.1f} GB, more than the {limit / 1e9:.1f} GB that "
                "models may use. Choose a smaller or more strongly quantized model, or raise max_weights_bytes."
            )
        pending = sum(load.prepared.weights_bytes for load in self.loads.values())
        idle = [name for name, resident in self.by_name.items() if not resident.has_work]
        while self.weights_bytes + pending + need > limit:
            if not idle:
                raise CapacityError(
                    f"There is no room for {prepared.name!r} while other models are in use.", BUSY_RETRY_S
                )
            del self.by_name[idle.pop(0)]

    def _scheduler(self, model: LoadedModel) -> Scheduler:
        """Make a scheduler with the model's cache manager, or without one if nothing of the model can be reused."""
        slots, layout, cache = SlotPool(self.cache.pool.ledger, model.runner.cost), model.runner.layout, None
        if not layout.refused:
            chunk_tokens = self.limits.chunk_tokens
            cache = KvCacheManager(self.cache, slots, layout, model.fingerprint, chunk_tokens, self.sharing)
        return Scheduler(self.limits, slots, cache)
