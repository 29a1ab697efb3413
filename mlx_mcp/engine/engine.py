"""The engine without its thread: takes commands, makes steps, tells each sequence's sink what happened.

Every mutable structure of the house hangs off one Engine and is touched by one thread, so nothing here locks. Knows
nothing of event loops, text or MLX.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from mlx_mcp.core.ports import Flight, LoadedModel, ModelLoader, PreparedModel, StepResult
from mlx_mcp.core.scheduler import Limits, Scheduler, Step
from mlx_mcp.core.sequence import FinishReason, Sequence
from mlx_mcp.core.slots import Ledger, SlotPool
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
from mlx_mcp.errors import (
    CapacityError,
    GenerationFailed,
    InvalidRequest,
    MlxMcpError,
    ModelError,
    RequestTooLarge,
)
from mlx_mcp.stats import EngineStats

logger = logging.getLogger(__name__)


@dataclass
class Resident:
    """A model in memory, the sequences that use it, and the step that is being computed."""

    model: LoadedModel
    scheduler: Scheduler
    step: Step | None = None
    flight: Flight | None = None

    @property
    def has_work(self) -> bool:
        """Whether a sequence has not ended, or a step's tokens are still to come."""
        return self.scheduler.has_work or self.flight is not None


@dataclass
class Live:
    """A sequence between Submit and its end."""

    sequence: Sequence
    resident: Resident
    sink: Sink


@dataclass
class PendingLoad:
    """A model whose weights are being read, one slice a step."""

    prepared: PreparedModel
    slices: Generator[float, None, LoadedModel]
    sinks: list[Sink] = field(default_factory=list)


class Engine:
    """Models, their schedulers and every live sequence."""

    def __init__(self, loader: ModelLoader, limits: Limits, max_weights_bytes: int, max_kv_bytes: int) -> None:
        self.loader, self.limits, self.max_weights_bytes = loader, limits, max_weights_bytes
        self.ledger = Ledger(max_kv_bytes)
        self.residents: dict[str, Resident] = {}  # least recently used first
        self.live: dict[int, Live] = {}
        self.loads: dict[str, PendingLoad] = {}
        self.num_steps = 0
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether step() would do something."""
        return bool(self.live or self.loads) or any(r.has_work for r in self.residents.values())

    @property
    def stats(self) -> EngineStats:
        """A snapshot; true at a step boundary."""
        residents = self.residents.values()
        return EngineStats(
            steps=self.num_steps,
            running=sum(len(r.scheduler.running) for r in residents),
            waiting=sum(r.scheduler.num_waiting for r in residents),
            preemptions=self.num_preemptions,
            rows=sum(r.model.runner.num_rows for r in residents),
            kv_bytes=sum(r.model.runner.kv_bytes for r in residents),
            kv_reserved_bytes=self.ledger.used_bytes,
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
            if resident.has_work:
                self._run(resident)

    def fail_all(self, error: MlxMcpError) -> None:
        """Tell every waiter that nothing more will come, and let go of everything."""
        sinks = [live.sink for live in self.live.values()] + [s for p in self.loads.values() for s in p.sinks]
        self.live.clear()
        self.loads.clear()
        self.residents.clear()
        self.ledger = Ledger(self.ledger.limit_bytes)
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
        ids = [*command.prompt_ids, *(token_id for token_id, _ in command.params.logit_bias)]
        if not command.prompt_ids or not all(0 <= i < model.vocab_size for i in ids):
            why = f"The prompt has no tokens, or prompt or logit_bias have ids beyond the model's {model.vocab_size}."
            command.sink(Failed(InvalidRequest(why)))
            return
        sequence = Sequence(
            command.sequence_id,
            command.prompt_ids,
            command.params,
            model.stop_ids,
            command.session or f"\0{command.sequence_id}",
            command.constraint,
        )
        try:
            resident.scheduler.add(sequence)
        except (CapacityError, RequestTooLarge) as error:
            command.sink(Failed(error))
            return
        self.live[sequence.sequence_id] = Live(sequence, resident, command.sink)
        command.sink(Waiting(resident.scheduler.num_ahead(sequence)))

    def _run(self, resident: Resident) -> None:
        """Take the tokens of the step in flight, or of the next one; meanwhile the one after may already run."""
        scheduler, runner = resident.scheduler, resident.model.runner
        step, flight = resident.step, resident.flight
        resident.step = resident.flight = None
        try:
            if step is None or flight is None:
                step = scheduler.schedule()
                self.num_preemptions += len(step.preempted)
                for sequence in step.preempted:
                    runner.release(sequence.sequence_id)
                flight = runner.launch(step)
            if not any(runner.must_wait(sequence) for sequence in step.drawing):
                resident.step = scheduler.ahead(step)
            if resident.step is not None:
                resident.flight = runner.launch(resident.step)
            result = flight.collect()
        except Exception as error:
            self._fail_step(resident, step, error)
        else:
            self._commit(resident, step, result)

    def _fail_step(self, resident: Resident, step: Step | None, error: Exception) -> None:
        """Fail a step's sequences, drop everything computed, and have the other sequences computed again.

        The fault may lie with any row of the step, and their tensors hold other rows too.
        """
        assert step is not None, "the scheduler broke"
        logger.exception("a step failed", exc_info=error)
        resident.step = resident.flight = None
        for sequence in step.sequences:
            self._fail(sequence.sequence_id, repr(error))
        resident.scheduler.preempt_all()
        resident.model.runner.reset()

    def _commit(self, resident: Resident, step: Step, result: StepResult) -> None:
        for sequence_id, cause in result.failed.items():
            self._fail(sequence_id, cause)
        finished = resident.scheduler.commit(step, result.tokens)
        for sequence in dict.fromkeys(chunk.sequence for chunk in step.prefill):
            if not sequence.num_preemptions:  # else the caller has heard it
                self._emit(sequence, Prefilled(sequence.num_computed))
        for sequence in step.drawing:
            live = self.live.get(sequence.sequence_id)
            if live is None or sequence.sequence_id not in result.tokens:
                continue
            if sequence.finish_reason is not FinishReason.STOP:
                self._emit(sequence, Token(sequence.output_ids[-1], result.logprobs.get(sequence.sequence_id)))
        for sequence in finished:
            resident.model.runner.release(sequence.sequence_id)
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
            sink(Failed(GenerationFailed(f"The generation failed: {cause.rstrip('.')}. Try again.")))

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
        idle = [name for name, r in self.residents.items() if not r.has_work]
        while self.stats.weights_bytes + pending + need > limit:
            if not idle:
                raise CapacityError(f"There is no room for {prepared.name!r} while other models are in use.", 15)
            del self.residents[idle.pop(0)]

    def _advance(self, pending: PendingLoad) -> None:
        event: Event
        try:
            event = Loading(next(pending.slices))
        except StopIteration as end:
            model: LoadedModel = end.value
            scheduler = Scheduler(self.limits, SlotPool(self.ledger, model.runner.cost))
            self.residents[model.name] = Resident(model, scheduler)
            event = Loaded(model)
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
