"""The engine without its thread: takes commands, makes steps, tells each sequence's sink what happened.

Every mutable structure of the house hangs off one Engine and is touched by one thread, so nothing here locks. Knows
nothing of event loops, text or MLX.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import partial

from mlx_mcp.core.cache.blocks import BlockPool
from mlx_mcp.core.cache.manager import KvCacheManager
from mlx_mcp.core.cache.misses import Miss, MissReason
from mlx_mcp.core.cache.prefixes import PrefixCache
from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.durable import Store
from mlx_mcp.core.ports import Flight, LoadedModel, LoadProgress, ModelLoader, PreparedModel, StepResult
from mlx_mcp.core.scheduler import RETRY_AFTER_S, Limits, Scheduler
from mlx_mcp.core.sequence import FinishReason, Sequence
from mlx_mcp.core.session import Session, SessionStore
from mlx_mcp.core.slots import Ledger, SlotPool
from mlx_mcp.core.steps import Step
from mlx_mcp.engine.io_thread import Io
from mlx_mcp.engine.messages import (
    Cancel,
    Close,
    Command,
    Done,
    Event,
    Failed,
    Find,
    Finish,
    Finished,
    Fork,
    ListSessions,
    Load,
    Loaded,
    Loading,
    Moved,
    OnDisk,
    Persist,
    Prefilled,
    Sink,
    Stop,
    Submit,
    Token,
    Unloaded,
    Waiting,
)
from mlx_mcp.engine.persistence import Persistence, PersistenceOptions, warn
from mlx_mcp.engine.session_commands import SessionCommands
from mlx_mcp.engine.session_files import SessionFiles
from mlx_mcp.errors import (
    CapacityError,
    EngineDead,
    GenerationFailed,
    InvalidRequest,
    MlxMcpError,
    ModelError,
    PromptTooLong,
    RequestError,
    SessionBusy,
    UnknownSession,
)
from mlx_mcp.stats import EngineStats

logger = logging.getLogger(__name__)

MAX_QUEUE = 64  # turns that wait for one session


@dataclass(frozen=True)
class Keeping:
    """What is kept between calls, and how long anything waits."""

    block_tokens: int = 64
    sharing: Sharing = field(default_factory=Sharing)
    max_sessions: int = 4096
    session_ttl_s: float = 86400.0
    max_wait_s: float = 300.0  # for memory; then a call is told to try again


@dataclass(frozen=True)
class Persisting:
    """Where sessions and evicted blocks are kept outside of memory, and who reads and writes there."""

    open_store: Callable[[], Store]
    io: Io
    options: PersistenceOptions = field(default_factory=PersistenceOptions)


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
    command: Submit
    since: float  # when it was last seen to run, or another to compute what it waits for
    session: Session | None = None  # that goes on with what comes of it

    @property
    def sink(self) -> Sink:
        """Who hears of it."""
        return self.command.sink


@dataclass
class PendingLoad:
    """A model whose weights are being read, one slice a step."""

    prepared: PreparedModel
    slices: Generator[LoadProgress, None, LoadedModel]
    sinks: list[Sink] = field(default_factory=list)


class Engine:
    """Models, their schedulers, every live sequence, cached block and session."""

    def __init__(
        self,
        loader: ModelLoader,
        limits: Limits,
        max_weights_bytes: int,
        max_kv_bytes: int,
        keeping: Keeping | None = None,
        clock: Callable[[], float] = time.monotonic,
        persisting: Persisting | None = None,
    ) -> None:
        self.loader, self.limits, self.max_weights_bytes = loader, limits, max_weights_bytes
        self.keeping, self.clock = keeping or Keeping(), clock
        self.ledger = Ledger(max_kv_bytes)
        self.cache = PrefixCache(BlockPool(self.ledger, self.keeping.block_tokens))
        self.sessions = SessionStore(self.cache.pool, clock, self.keeping.max_sessions, self.keeping.session_ttl_s)
        self.residents: dict[str, Resident] = {}  # least recently used first
        self.live: dict[int, Live] = {}
        self.queued: dict[int, Session] = {}  # turns that wait for another turn of their session
        self.loads: dict[str, PendingLoad] = {}
        self.persistence: Persistence | None = None
        if persisting is not None:
            self.persistence = Persistence(
                persisting.open_store, persisting.io, self.cache, self.sessions, persisting.options, clock
            )
        self.session_commands = SessionCommands(self.sessions, self.persistence, self.handle, self._close)
        self.session_files = SessionFiles(self.sessions, self.persistence, self._close)
        self.stopped = False
        self.looked_at = clock()  # when waiting times were last looked at
        self.num_steps = self.num_preemptions = self.num_prompt = self.num_cached = 0

    @property
    def has_work(self) -> bool:
        """Whether step() would do something."""
        return bool(self.live or self.loads) or any(r.has_work for r in self.residents.values())

    @property
    def stats(self) -> EngineStats:
        """A snapshot; true at a step boundary."""
        residents, pool = self.residents.values(), self.cache.pool
        return EngineStats(
            steps=self.num_steps,
            running=sum(len(r.scheduler.running) for r in residents),
            waiting=sum(r.scheduler.num_waiting for r in residents) + len(self.queued),
            preemptions=self.num_preemptions,
            rows=sum(r.model.runner.num_rows for r in residents),
            kv_bytes=sum(r.model.runner.kv_bytes for r in residents),
            kv_reserved_bytes=self.ledger.used_bytes - pool.used_bytes,
            cache_bytes=pool.used_bytes,
            cache_pinned_bytes=pool.protected_bytes,
            cache_blocks=pool.num_blocks,
            evictions=pool.num_evictions,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            sessions=len(self.sessions.sessions),
            groups=Counter(sequence.group for r in residents for sequence in r.scheduler.running),
            models=tuple(self.residents),
            weights_bytes=sum(r.model.weights_bytes for r in residents),
            **({} if self.persistence is None else self.persistence.counts),
        )

    def handle(self, command: Command) -> None:
        """Carry out one command; never raises for what a caller can cause."""
        self.look_at_the_clock()
        if self.stopped and not isinstance(command, Done):
            if not isinstance(command, Finish | Cancel | Stop):
                command.sink(Failed(EngineDead()))
            return
        match command:
            case Find(name, sink):
                sink(Loaded(self.residents[name].model) if name in self.residents else Unloaded())
            case Load():
                self._load(command)
            case Submit():
                if not (command.turn.session and self.session_commands.too_early(command)):
                    self._submit(command)
            case Finish(sequence_id, num_output):
                self._finish(sequence_id, num_output)
            case Cancel(sequence_id):
                self.session_commands.cancel(sequence_id)
                self._drop(sequence_id)
            case Fork() | Close() | ListSessions() | Persist():
                if not self.session_commands.too_early(command):
                    try:
                        self.session_commands.carry_out(command)
                    except MlxMcpError as error:
                        command.sink(Failed(error))
            case OnDisk():
                if not self.session_commands.too_early(command):
                    self.session_files.carry_out(command)
            case Done(tell):
                tell()
        if self.persistence is not None:
            self.persistence.flush()

    def step(self) -> bool:
        """Read one slice of every pending model, and one step of every resident one; returns whether there were any."""
        self.num_steps += 1
        self.look_at_the_clock()
        busy = bool(self.loads)
        for pending in list(self.loads.values()):
            self._advance(pending)
        for resident in list(self.residents.values()):
            if resident.has_work:
                busy |= self._run(resident)
        if self.persistence is not None:
            self.persistence.flush()
            self.persistence.engine_busy = self.has_work
        return busy

    @property
    def patience_s(self) -> float | None:
        """How long it may be left alone while it has no work; None: until a command comes."""
        autosave = self.persistence is not None and self.persistence.options.autosave_s is not None
        return 1.0 if autosave else None

    def stop(self) -> None:
        """Fail every call from now on, and have sessions written that are to be saved at the end.

        Whoever waits for a session to be written goes on waiting.
        """
        self.stopped = True
        self.session_commands.stop()
        self.session_files.stop()
        if self.persistence is not None:
            self.persistence.engine_busy = False
        self._fail_sequences(EngineDead())
        if self.persistence is not None and self.persistence.options.autosave_s is not None:
            self.persistence.save_changed()

    @property
    def saved(self) -> bool:
        """Whether no session is on its way to the disk."""
        return self.persistence is None or not (self.persistence.num_saving or self.persistence.opening)

    def close(self, deadline: float) -> None:
        """Let go of what belongs to the engine thread, and of the store once what is on its way there has come in."""
        if self.persistence is not None:
            self.persistence.close(deadline)
        self.loader.close()

    def fail_all(self, error: MlxMcpError) -> None:
        """Tell every waiter that nothing more will come, and let go of everything."""
        self.session_commands.fail_all(error)
        self.session_files.fail_all(error)
        self._fail_sequences(error)

    def _fail_sequences(self, error: MlxMcpError) -> None:
        sinks = [live.sink for live in self.live.values()] + [s for p in self.loads.values() for s in p.sinks]
        sinks += [turn.sink for session in dict.fromkeys(self.queued.values()) for turn in session.queue]
        self.live.clear()
        self.queued.clear()
        self.loads.clear()
        self.residents.clear()
        for sink in sinks:
            sink(Failed(error))

    def check_integrity(self) -> None:
        """Prove that sequences, slots, blocks, sessions and bytes agree: every reference and byte is somebody's."""
        booked, references = self.cache.pool.used_bytes, self.sessions.references
        for resident in self.residents.values():
            scheduler, cache = resident.scheduler, resident.scheduler.cache
            scheduler.check_integrity()
            booked += scheduler.pool.used_bytes
            if cache is not None:
                cuts = () if resident.step is None else resident.step.cuts
                assert set(cache.publishing.building) == set(cuts), (
                    "blocks are kept for another step than the one under way"
                )
                booked += cache.booked_bytes
                references += cache.references
        if self.persistence is not None:
            references += self.persistence.references
        self.cache.pool.check_integrity(references)
        self.sessions.check_integrity()
        self.ledger.check_integrity(booked)

    # Sequences

    def _submit(self, command: Submit) -> None:
        resident = self.residents.pop(command.model, None)
        if resident is None:
            command.sink(Unloaded())
            return
        self.residents[command.model] = resident  # now the most recently used
        session = None
        try:
            check_ids(command, resident.model)
            prompt, kept = command.prompt_ids, 0
            if command.turn.session:
                session = self.sessions.get(command.turn.tenant, command.turn.session)
                if not self.session_commands.is_here(command, session, resident.model) or not self._may_begin(
                    command, session
                ):
                    return
                prompt, kept = session.log + prompt, session.num_kept
                room = resident.model.context_tokens - len(prompt)
                if command.turn.cut and 0 < room < command.params.max_tokens:
                    command = replace(command, params=replace(command.params, max_tokens=room))
                if len(prompt) + command.params.max_tokens > resident.model.context_tokens:
                    asked = None if command.turn.cut else command.params.max_tokens
                    raise PromptTooLong(len(prompt), asked, resident.model.context_tokens)
            self._begin(command, resident, session, prompt, kept)
        except (RequestError, CapacityError) as error:
            command.sink(Failed(error))

    def _may_begin(self, command: Submit, session: Session) -> bool:
        """Whether the turn can begin now; if not, it was queued or told to come again.

        Raises:
            SessionBusy: another turn goes on with the session.
            InvalidRequest: the session is another model's.
        """
        turn = command.turn
        if session.model != command.model:
            raise InvalidRequest(f"The session belongs to the model {session.model!r}; leave `model` out.")
        if session.turn is not None and (turn.keep or not session.log):
            if not turn.queue:
                raise SessionBusy(turn.session, first=not session.log)
            if len(session.queue) >= MAX_QUEUE:
                raise CapacityError(f"{MAX_QUEUE} turns wait for this session already.", RETRY_AFTER_S)
            session.queue.append(command)
            self.queued[command.sequence_id] = session
            command.sink(Waiting(len(session.queue)))
            return False
        if session.after != turn.after:
            command.sink(Moved())
            return False
        return True

    def _begin(
        self, command: Submit, resident: Resident, session: Session | None, prompt: tuple[int, ...], kept: int
    ) -> None:
        """Put a sequence in the queue of its model."""
        turn, scheduler = command.turn, resident.scheduler
        lane = command.lane or (session.session_id if session is not None and turn.keep else f"\0{command.sequence_id}")
        sequence = Sequence(
            command.sequence_id,
            prompt,
            command.params,
            resident.model.stop_ids,
            lane,
            turn.tenant,
            kept,
            group=command.group,
        )
        if scheduler.cache is None and (session is not None or turn.opens is not None):
            sequence.miss = Miss(MissReason.NOT_REUSABLE, 0, detail=resident.model.runner.layout.refused)
        if session is not None:
            sequence.ephemeral = session.options.ephemeral
            if session.fingerprint not in (b"", resident.model.fingerprint):
                sequence.other_model, sequence.num_kept = True, len(session.log)
        if turn.opens is not None:
            sequence.ephemeral = turn.opens.ephemeral
            session = self.sessions.open(turn.tenant, command.model, turn.opens, turn.tools, command.sequence_id)
        try:
            scheduler.add(sequence)
        except MlxMcpError:
            if turn.opens is not None and session is not None:
                self.sessions.abandon(session)
            raise
        if turn.opens is None and session is not None:
            if turn.keep:
                self.sessions.begin(session, command.sequence_id)
            else:
                self.sessions.use(session)
                session = None
        if command.constraint is not None:
            resident.model.runner.constrain(sequence.sequence_id, command.constraint)
        self.live[sequence.sequence_id] = Live(sequence, resident, command, self.clock(), session)
        if self.persistence is not None and scheduler.cache is not None:
            self.persistence.fetch(sequence, scheduler.cache, resident.model.runner)
        command.sink(Waiting(scheduler.num_ahead(sequence)))

    def _run(self, resident: Resident) -> bool:
        """Take the tokens of the step in flight, or of the next one; meanwhile the one after may already run.

        Returns whether there was anything to compute.
        """
        scheduler, runner = resident.scheduler, resident.model.runner
        step, flight = resident.step, resident.flight
        resident.step = resident.flight = None
        started = math.inf
        try:
            if step is None or flight is None:
                step = scheduler.schedule()
                self._preempted(step.released)
                if not (step.rows or step.released):
                    return False
                started = self.clock()
                flight = runner.launch(step)
            if not any(runner.must_wait(sequence_id) for sequence_id in step.drawing):
                resident.step = scheduler.ahead(step)
            if resident.step is not None:
                resident.flight = runner.launch(resident.step)
            result = flight.collect()
            if self.persistence is not None and step.prefill and not step.decode and resident.step is None:
                self.persistence.computed(
                    sum(chunk.end - chunk.start for chunk in step.prefill), self.clock() - started
                )
        except Exception as error:
            self._fail_step(resident, step, error)
        else:
            self._commit(resident, step, result)
        return True

    def _preempted(self, sequence_ids: tuple[int, ...]) -> None:
        """Tell those that gave up their places that they wait."""
        self.num_preemptions += len(sequence_ids)
        for sequence_id in sequence_ids:
            live = self.live.get(sequence_id)
            if live is not None and live.sequence.slot is None:  # else it has a place again already
                self._emit(live.sequence, Waiting(live.resident.scheduler.num_ahead(live.sequence)))

    def _fail_step(self, resident: Resident, step: Step | None, error: Exception) -> None:
        """Fail a step's sequences, drop everything computed, and have the other sequences computed again.

        The fault may lie with any row of the step, and their tensors hold other rows too.
        """
        assert step is not None, "the scheduler broke"
        logger.exception("a step failed", exc_info=error)
        steps = [step] if resident.step is None else [step, resident.step]
        resident.step = resident.flight = None
        for sequence_id in step.rows:
            self._fail(sequence_id, repr(error))
        resident.scheduler.abandon(*steps)
        resident.model.runner.reset()

    def _commit(self, resident: Resident, step: Step, result: StepResult) -> None:
        for sequence_id, logits in result.logits.items():
            live = self.live.get(sequence_id)
            if live is not None and resident.scheduler.cache is not None and not live.command.turn.context:
                resident.scheduler.cache.remember(live.sequence, logits)
        ended = [self.live[i].sequence for i in resident.scheduler.commit(step, result.tokens, result.payloads)]
        for sequence in ended:
            self._keep(sequence)
            resident.scheduler.remove(sequence)
        for sequence_id, cause in result.failed.items():
            if sequence_id in self.live and resident.scheduler.cache is not None:
                resident.scheduler.cache.forget_blocks(self.live[sequence_id].sequence)
            self._fail(sequence_id, cause)
        for sequence_id in step.prompting:
            live = self.live.get(sequence_id)
            if live is not None and not live.sequence.num_preemptions:  # else the caller has heard it
                self._prefilled(live.sequence)
        for sequence_id in step.drawing:
            live = self.live.get(sequence_id)
            if live is None or live.command.turn.context or sequence_id not in result.tokens:
                continue
            if live.sequence.finish_reason is not FinishReason.STOP:
                self._emit(live.sequence, Token(live.sequence.output_ids[-1], result.logprobs.get(sequence_id)))
        for sequence in ended:
            self._ended(sequence)

    def _prefilled(self, sequence: Sequence) -> None:
        self._emit(
            sequence, Prefilled(sequence.num_computed, sequence.num_cached, sequence.num_restored, sequence.miss)
        )

    def _finish(self, sequence_id: int, num_output: int) -> None:
        """End a sequence after its first tokens; the step that may be under way computes it once for nothing."""
        live = self.live.get(sequence_id)
        if live is None:  # it ended on its own before its caller had read so far
            for session in self.sessions.sessions.values():
                end = session.latest[1] + num_output
                if session.latest[0] == sequence_id and session.turn is None and end < len(session.log):
                    self.sessions.shorten(session, end)
            return
        sequence, known = live.sequence, live.sequence.num_computed
        del sequence.output_ids[num_output:]
        sequence.num_computed, sequence.finish_reason = min(known, sequence.num_tokens), FinishReason.STOP
        self._keep(sequence, exact=sequence.num_computed == known)
        live.resident.scheduler.remove(sequence)
        self._ended(sequence)

    def _keep(self, sequence: Sequence, exact: bool = True) -> None:
        """Have the cache, and its session, keep what has come of a sequence that is about to give up its row.

        `exact` is whether the row ends where the sequence does.
        """
        live = self.live.get(sequence.sequence_id)
        if live is None:
            return
        turn, session, cache, leaf = live.command.turn, live.session, live.resident.scheduler.cache, None
        if turn.context:
            sequence.output_ids.clear()
        if cache is not None and sequence.slot is not None:
            cut = partial(live.resident.model.runner.cut, sequence.sequence_id)
            try:
                leaf = cache.finish(sequence, cut, exact)
            except Exception:  # what is not cached is computed again
                logger.exception("the end of a sequence could not be cached")
        if session is not None:
            self.sessions.finish(session, sequence.tokens(0, sequence.num_tokens), leaf, turn.context or "assistant")
            session.latest = sequence.sequence_id, len(sequence.prompt_ids)
            session.fingerprint = live.resident.model.fingerprint
            session.tokenizer = live.resident.model.tokenizer

    def _ended(self, sequence: Sequence) -> None:
        """Free a finished sequence's row, and tell."""
        live = self.live.pop(sequence.sequence_id, None)
        if live is None:
            return
        live.resident.model.runner.release(sequence.sequence_id)
        self.num_prompt += len(sequence.prompt_ids)
        self.num_cached += sequence.num_cached
        session = live.session
        assert sequence.finish_reason is not None, "it has not finished"
        live.sink(Finished(sequence.finish_reason, None if session is None else session.info))
        if session is not None:
            self._next_turn(session)

    def _emit(self, sequence: Sequence, event: Event) -> None:
        live = self.live.get(sequence.sequence_id)
        if live is not None and not live.sink(event):
            self._drop(sequence.sequence_id)

    def _fail(self, sequence_id: int, cause: str) -> None:
        sink = self._drop(sequence_id)
        if sink is not None:
            sink(Failed(GenerationFailed(f"The generation failed: {cause.rstrip('.')}. Try again.")))

    def _drop(self, sequence_id: int) -> Sink | None:
        """Forget a sequence, or a turn that waits for another; its session stays as it was."""
        waits = self.queued.pop(sequence_id, None)
        if waits is not None:
            waits.queue = deque(turn for turn in waits.queue if turn.sequence_id != sequence_id)
        live = self.live.pop(sequence_id, None)
        if live is None:
            return None
        live.resident.scheduler.remove(live.sequence)
        live.resident.model.runner.release(sequence_id)
        session = live.session
        if session is not None and self.sessions.is_open(session):
            self.sessions.abandon(session)
            self._next_turn(session)
        return live.sink

    def look_at_the_clock(self) -> None:
        """Once a second: end the sessions whose time has come, and fail whoever has waited for memory for too long."""
        now = self.clock()
        if now - self.looked_at < 1:
            return
        self.looked_at = now
        for session in self.sessions.expired():
            self._close(session)
            if self.persistence is not None:
                self.persistence.remove([session], warn)
        if self.persistence is not None:
            self.persistence.look_at_the_clock()
        for live in list(self.live.values()):
            cache = live.resident.scheduler.cache
            if live.sequence.slot is not None or (cache is not None and cache.is_waiting(live.sequence)):
                live.since = now
            elif now - live.since > self.keeping.max_wait_s:
                self._drop(live.sequence.sequence_id)
                live.sink(Failed(self._too_long(live, now)))

    def _too_long(self, live: Live, now: float) -> CapacityError:
        stats, scheduler = self.stats, live.resident.scheduler
        need = scheduler.pool.alone_bytes(live.sequence.num_tokens + 1)
        return CapacityError(
            f"The call waited {now - live.since:.0f} s for a place: it needs {need / 1e6:.1f} MB for keys and values. "
            f"Of {self.ledger.limit_bytes / 1e6:.1f} MB the {stats.running} running calls have "
            f"{stats.kv_reserved_bytes / 1e6:.1f} and pinned sessions {stats.cache_pinned_bytes / 1e6:.1f}. Close "
            "sessions that are not needed, or have the server started with a larger max_kv_bytes.",
            RETRY_AFTER_S,
        )

    # Sessions

    def _close(self, session: Session) -> None:
        """End a session and its turns."""
        waiting, session.queue = session.queue, deque()
        self.sessions.close(session)
        for command in waiting:
            del self.queued[command.sequence_id]
            command.sink(Failed(UnknownSession(session.session_id)))
        if session.turn is not None:
            sink = self._drop(session.turn)
            if sink is not None:
                sink(Failed(UnknownSession(session.session_id)))

    def _next_turn(self, session: Session) -> None:
        """Let the first turn begin that waits for this one's end."""
        while session.turn is None and session.queue:
            command = session.queue.popleft()
            del self.queued[command.sequence_id]
            if self.sessions.is_open(session):
                self._submit(command)
            else:
                command.sink(Failed(UnknownSession(session.session_id)))

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

    def _scheduler(self, model: LoadedModel) -> Scheduler:
        """A scheduler with the model's own view of the cache; with none where nothing can be reused."""
        slots, layout, cache = SlotPool(self.ledger, model.runner.cost), model.runner.layout, None
        if not layout.refused:
            chunk, sharing = self.limits.chunk_tokens, self.keeping.sharing
            cache = KvCacheManager(self.cache, slots, layout, model.fingerprint, chunk, sharing)
        return Scheduler(self.limits, slots, cache)

    def _advance(self, pending: PendingLoad) -> None:
        event: Event
        try:
            event = Loading(next(pending.slices))
        except StopIteration as end:
            model: LoadedModel = end.value
            self.residents[model.name] = Resident(model, self._scheduler(model))
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


def check_ids(command: Submit, model: LoadedModel) -> None:
    """Refuse tokens that the model does not have: MLX reads foreign memory for them, or dies.

    Raises:
        InvalidRequest: there are none at all, or the model's own tokenizer or logit_bias gave such ids.
    """
    if not command.prompt_ids:
        raise InvalidRequest("The prompt has no tokens. Say in `prompt` what the model should do.")
    last = model.vocab_size - 1
    foreign = next((i for i in command.prompt_ids if not 0 <= i <= last), None)
    if foreign is not None:
        raise InvalidRequest(
            f"The tokenizer of {model.name!r} gives the token id {foreign}, and the model's ids go up to {last}: its "
            "files do not belong together. Convert or download it again, or choose another model (list_models)."
        )
    biased = next((i for i, _ in command.params.logit_bias if not 0 <= i <= last), None)
    if biased is not None:
        raise InvalidRequest(f"logit_bias has token id {biased}; the ids of {model.name!r} go up to {last}.")


EngineFactory = Callable[[], Engine]
