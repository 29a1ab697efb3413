"""The engine without its thread: takes commands, takes steps, and tells callers what happened.

One Engine has all mutable structures, and one thread uses it, so nothing here is locked. Knows nothing of event loops,
text or MLX. `handle` puts a call into the table (`call.py`) and has it carried out, by `turns.py` if it is a
generation. What a call has to wait for is a value (`awaited.py`). When that is there, the call is carried out again
from the beginning.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_mcp.core.cache.blocks import BlockPool
from mlx_mcp.core.cache.prefixes import PrefixCache
from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.memory import Budget
from mlx_mcp.core.ports import ModelLoader
from mlx_mcp.core.scheduler import RETRY_AFTER_S, Limits
from mlx_mcp.core.session import SessionStore
from mlx_mcp.core.slots import Ledger
from mlx_mcp.engine.awaited import (
    Awaited,
    CallState,
    ModelRoom,
    SessionReading,
    StoreOpening,
)
from mlx_mcp.engine.call import Call, Calls, Emit
from mlx_mcp.engine.messages import (
    AboutSessions,
    Cancel,
    Close,
    Command,
    Encoded,
    Find,
    Finish,
    Fork,
    ListSessions,
    Load,
    OnDisk,
    Persist,
    ReadTokens,
    Stop,
    Submit,
    Unload,
    Waiting,
)
from mlx_mcp.engine.persistence import Persistence, Persisting
from mlx_mcp.engine.residents import Residents
from mlx_mcp.engine.results import (
    BlocksRead,
    BlocksWritten,
    SessionRead,
    SessionsRemoved,
    SessionWritten,
    StoreOpened,
    ThreadResult,
    VersionRead,
)
from mlx_mcp.engine.session_commands import SessionCommands
from mlx_mcp.engine.session_files import SessionFiles
from mlx_mcp.engine.stepping import Stepping
from mlx_mcp.engine.swapping import Swapping
from mlx_mcp.engine.turns import Turns
from mlx_mcp.errors import CapacityError, EngineDead, MlxMcpError
from mlx_mcp.stats import EngineStats

logger = logging.getLogger(__name__)

# For these a call waits `max_wait_s` at most.
WAITS_BOUNDED = (CallState.AWAITS_MEMORY, CallState.AWAITS_TOKENS, CallState.AWAITS_ROOM, CallState.HOLDS_MODEL)


@dataclass(frozen=True)
class EngineOptions:
    """How tokens and sessions are cached, how long a call may wait, and how long models stay."""

    block_tokens: int = 64
    sharing: Sharing = field(default_factory=Sharing)
    max_sessions: int = 4096
    session_ttl_s: float = 86400.0
    max_wait_s: float = 300.0  # how long a call waits for memory before it is told to try again
    model_turn_s: float = 10.0  # how long a model goes on to take calls while others wait for its room
    model_ttl_s: float | None = None  # how long a model stays without a call; None for as long as there is room
    share_prefixes: bool = False  # whether prompts of all tenants share keys and values; sessions are never shared


class Engine:
    """Models, their schedulers, every call, cached block and session."""

    def __init__(
        self,
        loader: ModelLoader,
        limits: Limits,
        max_weights_bytes: int,
        max_kv_bytes: int,
        options: EngineOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
        persisting: Persisting | None = None,
    ) -> None:
        self.loader, self.options, self.clock = loader, options or EngineOptions(), clock
        self.ledger = Ledger(max_kv_bytes)
        self.cache = PrefixCache(BlockPool(self.ledger, self.options.block_tokens))
        self.sessions = SessionStore(self.cache.pool, clock, self.options.max_sessions, self.options.session_ttl_s)
        self.calls = Calls()
        its = self.options
        budget = Budget(max_weights_bytes, max_kv_bytes)
        self.models = Residents(loader, limits, budget, self.cache, its.sharing, its.model_ttl_s)
        self.swapping = Swapping(self.calls, self.models, clock, its.model_turn_s)
        self.persistence: Persistence | None = None
        if persisting is not None:
            self.persistence = Persistence(persisting, self.calls, self.cache, self.sessions, clock)
        self.turns = Turns(self.calls, self.sessions, self.swapping, self.persistence, clock, its.share_prefixes)
        self.stepping = Stepping(self.calls, self.turns, self.persistence, clock)
        self.session_commands = SessionCommands(self.calls, self.sessions, self.turns, self.persistence)
        self.session_files = SessionFiles(self.calls, self.sessions, self.turns, self.persistence)
        self.stopped = False
        self.checked_at = clock()  # when `check_time` last did anything
        self.num_steps = 0

    def tell(self, emit: Emit) -> None:
        """Send all events to this function from now on."""
        self.calls.emit = emit

    @property
    def has_work(self) -> bool:
        """Whether step() would do something."""
        return self.models.has_work

    @property
    def stats(self) -> EngineStats:
        """A snapshot, which is consistent between steps."""
        residents, pool = self.models.by_name.values(), self.cache.pool
        waiting = (call for calls in self.calls.waiting.values() for call in calls.values())
        not_scheduled = sum(isinstance(call.request, Submit) and call.sequence is None for call in waiting)
        return EngineStats(
            steps=self.num_steps,
            running=sum(len(r.scheduler.running) for r in residents),
            waiting=sum(r.scheduler.num_waiting for r in residents) + not_scheduled,
            preemptions=self.stepping.num_preemptions,
            rows=sum(r.model.runner.num_rows for r in residents),
            kv_bytes=sum(r.model.runner.kv_bytes for r in residents),
            kv_reserved_bytes=self.ledger.used_bytes - pool.used_bytes,
            max_kv_bytes=self.ledger.limit_bytes,
            cache_bytes=pool.used_bytes,
            cache_pinned_bytes=pool.protected_bytes,
            cache_blocks=pool.num_blocks,
            evictions=pool.num_evictions,
            prompt_tokens=self.turns.num_prompt,
            cached_tokens=self.turns.num_cached,
            restored_tokens=self.turns.num_restored,
            computed_tokens=self.stepping.num_computed,
            output_tokens=self.stepping.num_output,
            sessions=len(self.sessions.sessions),
            groups=Counter(sequence.group for r in residents for sequence in r.scheduler.running),
            models=tuple(self.models.by_name),
            of_models={name: resident.stats(self.clock()) for name, resident in self.models.by_name.items()},
            loading=tuple(self.models.loads),
            awaited=tuple(self.swapping.line),
            weights_bytes=self.models.weights_bytes,
            max_weights_bytes=self.models.max_weights_bytes,
            max_memory_bytes=self.models.budget.ceiling_bytes,
            loads=self.swapping.num_loads,
            unloads=self.swapping.num_unloads,
            swaps=self.swapping.num_swaps,
            batch_rows=self.stepping.batch_rows.snapshot,
            queue_s=self.stepping.queue_s.snapshot,
            load_s=self.swapping.load_s.snapshot,
            **({} if self.persistence is None else self.persistence.counts),
        )

    def handle(self, command: Command) -> None:
        """Carry out one command; never raises for what a caller can cause."""
        self.check_time()
        match command:
            case Cancel(call_id):
                call = self.calls.get(call_id)
                if call is not None:
                    self.turns.drop(call)
            case Finish(call_id, num_output):
                self.turns.finish(call_id, num_output)
            case Encoded():
                self.turns.encoded(command)
            case Stop():
                self.stop()
            case (
                Find()
                | Load()
                | Unload()
                | Submit()
                | Fork()
                | Persist()
                | Close()
                | ListSessions()
                | ReadTokens()
                | OnDisk()
            ):
                call = self.calls.add(command, self.clock())
                if self.stopped:
                    self.calls.fail(call, EngineDead())
                else:
                    self._carry_out(call)
            case _:
                self._take(command)
        self.swapping.advance()
        if self.persistence is not None:
            self.persistence.offload.flush()

    def step(self) -> bool:
        """Read one slice of every pending model, and one step of every resident one; returns whether there were any."""
        self.num_steps += 1
        self.check_time()
        busy = bool(self.models.loads)
        self.swapping.read_slices()
        for resident in list(self.models.by_name.values()):
            if resident.has_work:
                busy |= self.stepping.run(resident)
        self.cache.pool.trim()
        self.swapping.advance()
        if self.persistence is not None:
            self.persistence.offload.flush()
            self.persistence.engine_busy = self.has_work
        return busy

    @property
    def idle_s(self) -> float | None:
        """After how many seconds without work it must be called again; None if it can wait for a command."""
        autosave = self.persistence is not None and self.persistence.options.autosave_s is not None
        return 1.0 if autosave or self.calls or self.models.expire else None

    def stop(self) -> None:
        """Fail every call from now on, and have sessions written that are to be saved at the end.

        Calls that wait for the disk continue to wait.
        """
        self.stopped = True
        self.session_files.stop()
        if self.persistence is not None:
            self.persistence.engine_busy = False
        self.swapping.clear()
        for call in self.calls:
            if call.state is not CallState.AWAITS_DISK:
                self.calls.fail(call, EngineDead())
        if self.persistence is not None and self.persistence.options.autosave_s is not None:
            self.persistence.save_changed()

    @property
    def all_saved(self) -> bool:
        """Whether no session is being written to disk."""
        return self.persistence is None or self.persistence.all_saved

    def close(self, deadline: float) -> None:
        """Free what belongs to the engine thread, and close the store when all writes are done."""
        if self.persistence is not None:
            self.persistence.close(deadline)
        self.loader.close()

    def fail_all(self, error: MlxMcpError) -> None:
        """Fail every call, and unload every model."""
        self.swapping.clear()
        for call in self.calls:
            self.calls.fail(call, error)

    def check_integrity(self) -> None:
        """Prove that calls, slots, blocks, sessions and bytes agree: every reference and byte has an owner."""
        booked, references = self.cache.pool.used_bytes, self.sessions.references
        for resident in self.models.by_name.values():
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
        self.calls.check_integrity()
        self.swapping.check_integrity()

    def check_time(self) -> None:
        """Once a second, end what has lasted too long, and tell callers what their calls wait for."""
        now = self.clock()
        if now - self.checked_at < 1:
            return
        self.checked_at = now
        for session in self.sessions.expired():
            self.turns.close(session)
            if self.persistence is not None:
                self.persistence.remove([session])
        if self.persistence is not None:
            self.persistence.autosave_if_due()
        self.swapping.check_time(now)
        for call in self.calls:
            if isinstance(call.request, Submit | Find | Load):
                self._check_wait(call, now)
        self.swapping.advance()

    # Calls

    def _carry_out(self, call: Call) -> None:
        """Carry out a call from the beginning, or have it wait."""
        request, persistence = call.request, self.persistence
        if isinstance(request, Submit):
            self.swapping.uses(call)  # from now on, whatever it waits for first
        about_sessions = isinstance(request, AboutSessions | OnDisk) or (
            isinstance(request, Submit) and bool(request.turn.session)
        )
        if about_sessions and persistence is not None and persistence.opening:
            self.calls.wait(call, StoreOpening())
            return
        try:
            match request:
                case Find():
                    self.swapping.find(call, request)
                case Load():
                    self.swapping.load(call, request)
                case Unload():
                    self.swapping.unload(call, request)
                case Submit():
                    self.turns.begin(call)
                case OnDisk():
                    self.session_files.carry_out(call)
                case _:
                    self.session_commands.carry_out(call)
        except MlxMcpError as error:
            self.turns.fail(call, error)

    def _resume(self, awaited: Awaited, error: MlxMcpError | None = None) -> None:
        """Carry out the calls that waited for this from the beginning, or fail them."""
        for call in self.calls.wake(awaited):
            if call.ended:  # by one before it
                continue
            if error is not None:
                self.turns.fail(call, error)
            elif self.stopped:
                self.turns.fail(call, EngineDead())
            else:
                self._carry_out(call)

    def _take(self, result: ThreadResult) -> None:
        """Take a result of the thread that reads and writes."""
        persistence = self.persistence
        assert persistence is not None, f"{result} though nothing is kept"
        match result:
            case StoreOpened():
                persistence.on_store_opened(result)
                self._resume(StoreOpening())
            case SessionRead(session_id):
                self._resume(SessionReading(session_id), persistence.on_session_read(result))
            case VersionRead():
                self.session_commands.on_version_read(result)
            case SessionWritten():
                if not self.session_commands.on_session_written(result, persistence.on_session_written(result)):
                    warn(result.outcome, "a session was not persisted")
            case SessionsRemoved():
                if not self.session_commands.on_sessions_removed(result):
                    warn(result.outcome, "sessions were not removed from disk")
            case BlocksRead():
                persistence.restoring.on_blocks_read(result)
            case BlocksWritten():
                persistence.on_blocks_written(result)
            case _:
                self.session_files.on_result(result)

    def _check_wait(self, call: Call, now: float) -> None:
        """Fail a call that has waited for too long, or tell its caller what it waits for now."""
        if call.ended:  # by one before it
            return
        awaits = call.awaits_now
        if call.state not in WAITS_BOUNDED:
            call.since = now
        elif now - call.since > self.options.max_wait_s:
            self.turns.fail(call, self._too_long(call, now))
            return
        if isinstance(awaits, ModelRoom):
            self.turns.tell(call, self.swapping.waiting(awaits.name))
        elif isinstance(call.request, Submit) and awaits is not None and type(awaits) is not type(call.told):
            num_ahead = 0 if call.sequence is None else call.row[1].scheduler.num_ahead(call.sequence)
            self.turns.tell(call, Waiting(num_ahead, awaits))
        call.told = awaits

    def _too_long(self, call: Call, now: float) -> CapacityError:
        if isinstance(call.awaits, ModelRoom):
            return self.swapping.too_long(call, now)
        if call.sequence is None:
            return CapacityError(f"The call waited {now - call.since:.0f} s for its prompt.", RETRY_AFTER_S)
        sequence, resident = call.row
        stats, need = self.stats, resident.scheduler.pool.alone_bytes(sequence.num_tokens + 1)
        return CapacityError(
            f"The call waited {now - call.since:.0f} s for a place: it needs {need / 1e6:.1f} MB for keys and values. "
            f"Of {self.ledger.limit_bytes / 1e6:.1f} MB the {stats.running} running calls have "
            f"{stats.kv_reserved_bytes / 1e6:.1f} and pinned sessions {stats.cache_pinned_bytes / 1e6:.1f}. Close "
            "sessions that are not needed, or have the server started with a larger max_kv_bytes.",
            RETRY_AFTER_S,
        )


def warn(outcome: object, words: str) -> None:
    """Log the error of work that no call waits for."""
    if isinstance(outcome, MlxMcpError):
        logger.warning("%s: %s", words, outcome)


EngineFactory = Callable[[], Engine]
