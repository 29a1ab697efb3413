"""The engine without its thread: takes commands, makes steps, tells each sequence's sink what happened.

Every mutable structure of the house hangs off one Engine and is touched by one thread, so nothing here locks. Knows
nothing of event loops, text or MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from mlx_mcp.core.ports import LoadedModel, ModelLoader, PreparedModel
from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.engine.messages import (
    Cancel,
    Command,
    Event,
    Failed,
    Find,
    Finished,
    Load,
    Loaded,
    Loading,
    Prefilled,
    Sink,
    Submit,
    Token,
    Unloaded,
    Waiting,
)
from mlx_mcp.errors import CapacityError, GenerationFailed, InvalidRequest, MlxMcpError, ModelError
from mlx_mcp.stats import EngineStats


@dataclass
class Resident:
    """A model in memory and the sequences that use it."""

    model: LoadedModel
    scheduler: Scheduler


@dataclass
class Live:
    """A sequence between Submit and its end."""

    sequence: Sequence
    resident: Resident
    sink: Sink
    prefill_told: int = 0


@dataclass
class PendingLoad:
    """A model whose weights are being read, one slice a step."""

    prepared: PreparedModel
    slices: Generator[float, None, LoadedModel]
    sinks: list[Sink] = field(default_factory=list)


class Engine:
    """Models, their schedulers and every live sequence."""

    def __init__(self, loader: ModelLoader, limits: Limits, max_weights_bytes: int) -> None:
        self.loader, self.limits, self.max_weights_bytes = loader, limits, max_weights_bytes
        self.residents: dict[str, Resident] = {}  # least recently used first
        self.live: dict[int, Live] = {}
        self.loads: dict[str, PendingLoad] = {}
        self.num_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether step() would do something."""
        return bool(self.live or self.loads)

    @property
    def stats(self) -> EngineStats:
        """A snapshot; true at a step boundary."""
        residents = self.residents.values()
        return EngineStats(
            steps=self.num_steps,
            running=sum(len(r.scheduler.running) for r in residents),
            waiting=sum(len(r.scheduler.waiting) for r in residents),
            rows=sum(r.model.runner.num_rows for r in residents),
            models=tuple(self.residents),
            weights_bytes=sum(r.model.weights_bytes for r in residents),
        )

    def handle(self, command: Command) -> None:
        """Carry out one command; never raises for what a caller can cause."""
        match command:
            case Find(name, sink):
                sink(Loaded(self.residents[name].model) if name in self.residents else Unloaded())
            case Load():
                self._load(command)
            case Submit():
                self._submit(command)
            case Cancel(sequence_id):
                self._drop(sequence_id)

    def step(self) -> None:
        """Read one slice of every pending model, and one step of every resident one."""
        self.num_steps += 1
        for pending in list(self.loads.values()):
            self._advance(pending)
        for resident in list(self.residents.values()):
            if resident.scheduler.has_work:
                self._run(resident)

    def fail_all(self, error: MlxMcpError) -> None:
        """Tell every waiter that nothing more will come, and let go of everything."""
        sinks = [live.sink for live in self.live.values()] + [s for p in self.loads.values() for s in p.sinks]
        self.live.clear()
        self.loads.clear()
        self.residents.clear()
        for sink in sinks:
            sink(Failed(error))

    # Sequences

    def _submit(self, command: Submit) -> None:
        resident = self.residents.pop(command.model, None)
        if resident is None:
            command.sink(Unloaded())
            return
        self.residents[command.model] = resident  # now the most recently used
        model = resident.model
        # MLX reads foreign memory for an id beyond the embedding, or dies: no such id may reach it.
        if not command.prompt_ids or not all(0 <= i < model.vocab_size for i in command.prompt_ids):
            command.sink(Failed(InvalidRequest("The prompt has no tokens, or token ids that the model does not have.")))
            return
        sequence = Sequence(command.sequence_id, command.prompt_ids, command.params, model.stop_ids)
        try:
            resident.scheduler.add(sequence)
        except CapacityError as error:
            command.sink(Failed(error))
            return
        self.live[sequence.sequence_id] = Live(sequence, resident, command.sink)
        command.sink(Waiting(resident.scheduler.num_ahead(sequence) - 1))

    def _run(self, resident: Resident) -> None:
        step = resident.scheduler.schedule()
        runner = resident.model.runner
        try:
            result = runner.run(step)
        except Exception as error:
            # The fault may lie with any row of the step: all of them go, and with them everything they touched.
            for sequence in dict.fromkeys([*(chunk.sequence for chunk in step.prefill), *step.decode]):
                self._fail(sequence.sequence_id, repr(error))
            return
        for sequence_id, cause in result.failed.items():
            self._fail(sequence_id, cause)
        finished = resident.scheduler.commit(step, result.tokens)
        for sequence in dict.fromkeys(chunk.sequence for chunk in step.prefill):
            self._emit(sequence, Prefilled(sequence.num_computed))
        for sequence_id in result.tokens:
            live = self.live.get(sequence_id)
            if live is not None and live.sequence.finish_reason != "stop":
                self._emit(live.sequence, Token(live.sequence.last_id))
        for sequence in finished:
            runner.release(sequence.sequence_id)
            live = self.live.pop(sequence.sequence_id, None)
            if live is not None and sequence.finish_reason is not None:
                live.sink(Finished(sequence.finish_reason))

    def _emit(self, sequence: Sequence, event: Event) -> None:
        live = self.live.get(sequence.sequence_id)
        if live is not None and not live.sink(event):
            self._drop(sequence.sequence_id)

    def _fail(self, sequence_id: int, cause: str) -> None:
        sink = self._drop(sequence_id)
        if sink is not None:
            sink(Failed(GenerationFailed(f"The generation failed: {cause}. Try again.")))

    def _drop(self, sequence_id: int) -> Sink | None:
        live = self.live.pop(sequence_id, None)
        if live is None:
            return None
        live.resident.scheduler.remove(live.sequence)
        live.resident.model.runner.release(sequence_id)
        return live.sink

    # Models

    def _load(self, command: Load) -> None:
        prepared = command.prepared
        if prepared.name in self.residents:
            command.sink(Loaded(self.residents[prepared.name].model))
        elif prepared.name in self.loads:
            self.loads[prepared.name].sinks.append(command.sink)
        else:
            try:
                self._make_room(prepared)
            except MlxMcpError as error:
                command.sink(Failed(error))
                return
            slices = self.loader.materialise(prepared)
            self.loads[prepared.name] = PendingLoad(prepared, slices, [command.sink])

    def _make_room(self, prepared: PreparedModel) -> None:
        """Unload idle models, least recently used first, until the new one's weights fit.

        Raises:
            ModelError: it would not fit alone.
            CapacityError: models that are in use or being read take the room.
        """
        need, limit = prepared.weights_bytes, self.max_weights_bytes
        if need > limit:
            raise ModelError(
                f"The weights of {prepared.name!r} take {need / 1e9:.1f} GB, more than the {limit / 1e9:.1f} GB that "
                "models may use. Choose a smaller or more strongly quantized model, or raise max_weights_bytes."
            )
        pending = sum(load.prepared.weights_bytes for load in self.loads.values())
        idle = [name for name, r in self.residents.items() if not r.scheduler.has_work]
        while self.stats.weights_bytes + pending + need > limit:
            if not idle:
                raise CapacityError(f"There is no room for {prepared.name!r} while other models are in use.", 15)
            del self.residents[idle.pop(0)]

    def _advance(self, pending: PendingLoad) -> None:
        event: Event
        try:
            event = Loading(next(pending.slices))
        except StopIteration as end:
            self.residents[pending.prepared.name] = Resident(end.value, Scheduler(self.limits))
            event = Loaded(end.value)
        except MlxMcpError as error:
            event = Failed(error)
        except Exception as error:
            # A model that cannot be read must not end the thread under the rows of the others.
            event = Failed(ModelError(f"Loading {pending.prepared.name!r} failed: {error!r}."))
        if not isinstance(event, Loading):
            del self.loads[pending.prepared.name]
        for sink in pending.sinks:
            sink(event)


EngineFactory = Callable[[], Engine]
