"""Everything that can befall sessions, in any order, against lists of plain tokens."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import DataObject

from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.durable import Store
from mlx_mcp.core.ports import ModelLoader, ModelSpec
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.session import Session, SessionOptions
from mlx_mcp.engine.engine import Engine, EngineOptions
from mlx_mcp.engine.messages import (
    Cancel,
    Close,
    EncodeAgain,
    Encoded,
    Event,
    Failed,
    Finish,
    Finished,
    Fork,
    Load,
    Loaded,
    Persist,
    Persisted,
    Prefilled,
    Sessions,
    Submit,
    Token,
    Turn,
)
from mlx_mcp.engine.persistence import PersistenceOptions, Persisting
from mlx_mcp.errors import CapacityError, InvalidRequest, MlxMcpError, RequestError, SessionBusy, UnknownSession
from tests.engine.hand_io import HandIo
from tests.engine.hearing import hear

LIMITS = Limits(max_running=4, chunk_tokens=8, prefill_tokens_idle=16, prefill_tokens_busy=8)
KEEPING = EngineOptions(block_tokens=4, sharing=Sharing(2, 8), max_sessions=12, session_ttl_s=100, max_wait_s=1000)
TENANTS = ("ann", "bob")
# Prompts begin alike, so that prefixes are shared, part, and are each other's.
TEXTS = [tuple((7 * i + i * i // 3) % 29 + 2 for i in range(start, start + 160)) for start in (0, 50)]
TEXTS.append(TEXTS[0][:13] + TEXTS[1][13:])
LENGTHS = st.integers(1, 30) | st.integers(110, 150)  # on both sides of the smallest slot's length


Tokens = tuple[int, ...]


class Heard(list[Event]):
    """What a command was answered."""

    def __call__(self, event: Event) -> bool:
        self.append(event)
        return True


class Call:
    """A generation under way, and what has been heard of it."""

    def __init__(self, prompt: Tokens, session: str, opens: bool) -> None:
        self.submit: Submit
        self.prompt, self.session, self.opens = prompt, session, opens
        self.output: list[int] = []
        self.ended: Event | None = None
        self.error: MlxMcpError | None = None
        self.cut: int | None = None  # so many tokens were wanted in the end
        self.repeats = self.again = False

    def __call__(self, event: Event) -> bool:
        assert self.ended is None, f"{event} after the end"
        match event:
            case Prefilled(num_tokens, num_cached):
                self.repeats = num_tokens == num_cached
            case Token(token_id):
                self.output.append(token_id)
            case Finished():
                self.ended = event
            case Failed(error):
                self.ended, self.error = event, error
            case EncodeAgain():
                self.again = True
        return True


class SessionMachine(RuleBasedStateMachine):
    """The engine beside an oracle: each session's tokens, and each generation's."""

    def make_loader(self) -> ModelLoader:
        """The models `tiny` and `other`, of which there is room for one."""
        raise NotImplementedError

    def expected(self, model: str, prompt: Tokens, output: Tokens, params: SamplingParams, finished: bool) -> None:
        """Prove that the model alone says this after the prompt."""
        raise NotImplementedError

    def check_kept(self, session: Session) -> None:
        """Prove that what is cached of a session is what its tokens give."""

    open_store: Callable[[], Store] | None = None  # opens what outlives an engine
    max_kv_bytes = 1 << 30
    max_weights_bytes = 150
    hash_bytes = 32
    seen: ClassVar[Counter[str]] = Counter()  # what befell all machines; each kind of machine has its own

    def __init__(self) -> None:
        super().__init__()
        self.now, self.number = 0.0, 0
        self.model = "tiny"
        self.begin_engine()
        self.calls: dict[int, Call] = {}
        self.saved: dict[str, tuple[Tokens, str]] = {}  # handle → tokens and role, as they are on disk
        self.logs: dict[str, Tokens] = {}  # handle → tokens, as far as the oracle knows
        self.after: dict[str, str] = {}
        self.busy: dict[str, Call] = {}  # handle → the call that goes on with it

    def begin_engine(self) -> None:
        self.io, persisting = HandIo(), None
        if self.open_store is not None:
            persisting = Persisting(self.open_store, self.io, PersistenceOptions(unused_ttl_s=1))
        self.engine = Engine(
            self.make_loader(), LIMITS, self.max_weights_bytes, self.max_kv_bytes, KEEPING, lambda: self.now, persisting
        )
        self.io.engine = self.engine
        self.engine.models.cache = replace(self.engine.cache, hash_bytes=self.hash_bytes)
        self.io.run_all()
        self.load(self.model)

    def advance(self) -> bool:
        """One step, or one piece of reading and writing if there is nothing to do; returns whether there was either."""
        if self.engine.step():
            return True
        if self.io.work:
            self.io.run()()
            return True
        return False

    def load(self, name: str) -> None:
        heard = Heard()
        spec = ModelSpec(name, "folder", f"/nowhere/{name}")
        prepared = self.engine.loader.prepare(spec, lambda line: None)
        self.engine.handle(Load(hear(self.engine, heard), prepared))
        for _ in range(100):
            if heard and isinstance(heard[-1], Loaded | Failed):
                break
            self.engine.step()
        assert isinstance(heard[-1], Loaded), heard[-1]

    def submit(self, prompt: Tokens, max_tokens: int, turn: Turn, seed: int = 0) -> Call:
        self.number += 1
        session = self.engine.sessions.sessions.get(turn.session)
        before = self.logs[turn.session] if session is not None else ()
        params = SamplingParams(max_tokens, temperature=0.0, seed=seed)
        call = Call(before + prompt, turn.session if turn.keep else "", turn.opens is not None)
        model = session.model if session is not None else self.model
        hear(self.engine, call, self.number)
        call.submit = Submit(self.number, model, prompt, params, turn=turn)
        self.engine.handle(call.submit)
        if call.ended is None:
            self.calls[self.number] = call
            if call.opens:
                (opened,) = set(self.engine.sessions.sessions) - set(self.logs)
                call.session = opened
                self.logs[opened], self.after[opened] = (), "user"
            if call.session and call.session not in self.busy:
                self.busy[call.session] = call
        self.settle()
        return call

    def settle(self) -> None:
        """Bring the oracle up to date with what has ended."""
        for number, call in list(self.calls.items()):
            if call.again:
                call.again, submit = False, call.submit
                after = self.engine.sessions.sessions[submit.turn.session].after
                self.engine.handle(Encoded(number, submit.prompt_ids, submit.params, None, after))
                self.seen["encoded again"] += 1
        for number, call in list(self.calls.items()):
            if call.ended is None:
                continue
            del self.calls[number]
            self.seen[type(call.error or call.ended).__name__] += 1
            self.seen["repeats"] += call.repeats
            if call.session and self.busy.get(call.session) is call:
                del self.busy[call.session]
            if isinstance(call.ended, Finished):
                self.finished(call)
            elif call.opens:
                self.forget(call.session)
            assert call.error is None or isinstance(call.error, CapacityError | UnknownSession | RequestError)
        for handle in list(self.busy):
            waiting = [c for c in self.calls.values() if c.session == handle]
            self.busy[handle] = waiting[0]
        for handle in [h for h in self.logs if h not in self.engine.sessions.sessions]:
            self.forget(handle)
        for handle in [h for h in self.saved if h not in self.logs]:
            del self.saved[handle]

    def forget(self, handle: str) -> None:
        self.logs.pop(handle, None)
        self.after.pop(handle, None)

    def finished(self, call: Call) -> None:
        assert isinstance(call.ended, Finished)
        turn, info = call.submit.turn, call.ended.session
        prompt = call.prompt
        if call.session and not call.opens:
            prompt = self.logs[call.session] + call.submit.prompt_ids  # it may have waited for others
        if turn.context:
            assert not call.output
            log, after = prompt, turn.context
        else:
            output = tuple(call.output if call.cut is None else call.output[: call.cut])
            self.expected(call.submit.model, prompt, output, call.submit.params, call.cut is None)
            log, after = prompt + output, "assistant"
        assert (info is None) == (not call.session)
        if info is not None and call.session in self.logs:
            self.logs[call.session], self.after[call.session] = log, after

    def idle_sessions(self) -> list[str]:
        return [h for h in self.logs if self.logs[h]]

    def pick(self, data: DataObject | None, handles: list[str]) -> str:
        """One that Hypothesis draws; the first where a story is scripted."""
        return handles[0] if data is None else data.draw(st.sampled_from(handles))

    # What can happen

    @initialize(n=LENGTHS, count=st.integers(1, 3))
    def begin(self, n: int, count: int) -> None:
        self.submit(TEXTS[0][:n], 4, Turn(TENANTS[0], opens=SessionOptions()))
        self.repeat(0, 1 + n % 20, 1, TENANTS[0])
        self.drain()
        handle = next(iter(self.logs))
        self.engine.handle(Fork(hear(self.engine, lambda event: True), TENANTS[0], handle, count, ()))
        for other in self.engine.sessions.sessions:
            self.logs[other], self.after[other] = self.logs[handle], self.after[handle]

    @rule(text=st.integers(0, 2), n=LENGTHS, most=st.integers(1, 30) | st.just(120), tenant=st.sampled_from(TENANTS))
    def generate(self, text: int, n: int, most: int, tenant: str) -> None:
        self.submit(TEXTS[text][:n], most, Turn(tenant))

    @rule(text=st.integers(0, 2), n=st.integers(1, 20), most=st.integers(1, 8), tenant=st.sampled_from(TENANTS))
    def repeat(self, text: int, n: int, most: int, tenant: str) -> None:
        """A prompt that is still there with the logits after it, if there was room."""
        self.generate(text, n, 1, tenant)
        self.drain()
        self.generate(text, n, most, tenant)

    @precondition(lambda self: not self.calls)
    @rule(text=st.integers(0, 2), tenant=st.sampled_from(TENANTS))
    def crowd(self, text: int, tenant: str) -> None:
        """More rows that grow than there may be room for."""
        for i in range(3):
            self.submit(TEXTS[(text + i) % 3][: 112 + i], 60, Turn(tenant))

    @rule(
        text=st.integers(0, 2),
        n=LENGTHS,
        most=st.integers(1, 8),
        tenant=st.sampled_from(TENANTS),
        context=st.booleans(),
        ephemeral=st.booleans(),
        pinned=st.sampled_from([False, False, False, True]),
        ttl=st.sampled_from([None, 5]),
    )
    def open(
        self,
        text: int,
        n: int,
        most: int,
        tenant: str,
        context: bool,
        ephemeral: bool,
        pinned: bool,
        ttl: float | None,
    ) -> None:
        options = SessionOptions(ephemeral=ephemeral, pinned=pinned, ttl_s=ttl)
        self.submit(
            TEXTS[text][:n], 1 if context else most, Turn(tenant, opens=options, context="user" if context else "")
        )

    @precondition(lambda self: self.idle_sessions())
    @rule(
        data=st.data(),
        text=st.integers(0, 2),
        n=st.integers(1, 10) | st.integers(60, 90),
        most=st.integers(1, 30),
        keep=st.booleans(),
        queue=st.booleans(),
    )
    def turn(self, data: DataObject | None, text: int, n: int, most: int, keep: bool, queue: bool) -> None:
        handle = self.pick(data, self.idle_sessions())
        session = self.engine.sessions.sessions[handle]
        if session.model not in self.engine.models.by_name:
            return
        was_busy = session.turn is not None
        call = self.submit(
            TEXTS[text][20 : 20 + n], most, Turn(session.tenant, handle, self.after[handle], keep, queue)
        )
        if was_busy and keep and not queue:
            assert isinstance(call.error, SessionBusy)

    @precondition(lambda self: self.idle_sessions())
    @rule(data=st.data(), text=st.integers(0, 2), n=st.integers(1, 10) | st.integers(60, 90), most=st.integers(1, 30))
    def converse(self, data: DataObject | None, text: int, n: int, most: int) -> None:
        self.turn(data, text, n, most, True, True)
        self.drain()

    @precondition(lambda self: self.idle_sessions())
    @rule(data=st.data(), count=st.integers(1, 3))
    def fork(self, data: DataObject | None, count: int) -> None:
        handle = self.pick(data, self.idle_sessions())
        heard, tenant = Heard(), self.engine.sessions.sessions[handle].tenant
        before, rested = self.engine.ledger.used_bytes, self.engine.sessions.sessions[handle].on_disk_only
        self.engine.handle(Fork(hear(self.engine, heard), tenant, handle, count, ()))
        while not heard:  # its tokens come from disk
            self.io.run()()
        if isinstance(heard[0], Failed):
            assert isinstance(heard[0].error, CapacityError)
            return
        assert isinstance(heard[0], Sessions)
        assert rested or self.engine.ledger.used_bytes == before
        self.seen["forks while generating"] += self.engine.sessions.sessions[handle].turn is not None
        for info in heard[0].infos:
            self.logs[info.session_id], self.after[info.session_id] = self.logs[handle], self.after[handle]

    @precondition(lambda self: self.logs)
    @rule(data=st.data())
    def close(self, data: DataObject | None) -> None:
        handle = self.pick(data, list(self.logs))
        heard, tenant = Heard(), self.engine.sessions.sessions[handle].tenant
        self.engine.handle(Close(hear(self.engine, heard), tenant, (handle,)))
        while not heard:
            self.io.run()()
        self.saved.pop(handle, None)
        assert isinstance(heard[0], Sessions)
        assert handle not in self.engine.sessions.sessions
        self.settle()

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def cancel(self, data: DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.calls)))
        call = self.calls.pop(number)
        self.engine.handle(Cancel(number))
        if call.opens:
            self.forget(call.session)
        if self.busy.get(call.session) is call:
            del self.busy[call.session]
        self.settle()

    def has_row(self, number: int) -> bool:
        """Whether a generation has a row, or a place in the queue for one."""
        call = self.engine.calls.get(number)
        return call is not None and call.sequence is not None and not call.submit.turn.context

    @precondition(lambda self: any(self.has_row(number) for number in self.calls))
    @rule(data=st.data())
    def stop(self, data: DataObject) -> None:
        """By a stop string, or early: while it waits for a row or its prompt is read, too."""
        call = self.calls[data.draw(st.sampled_from([number for number in self.calls if self.has_row(number)]))]
        call.cut = max(0, len(call.output) - data.draw(st.integers(0, 1)))
        self.seen["ended without a token"] += not call.cut
        self.engine.handle(Finish(call.submit.call_id, call.cut))
        assert isinstance(call.ended, Finished)
        self.settle()

    @rule(n=st.integers(1, 6))
    def step(self, n: int) -> None:
        for _ in range(n):
            self.advance()
            self.settle()

    @rule()
    def drain(self) -> None:
        for _ in range(50_000):  # tight memory runs calls one after another, and computes some again
            if not self.calls:
                return
            if not self.advance():
                self.now += 100  # what is pinned may take all the room
                self.engine.step()  # sees that sessions have expired
            self.settle()
        raise AssertionError(f"{len(self.calls)} calls never end")

    @rule(seconds=st.sampled_from([1, 10, 60]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.engine.step()
        self.settle()

    @rule(share=st.floats(0, 1))
    def evict(self, share: float) -> None:
        pool = self.engine.cache.pool
        before = pool.used_bytes
        free = before - pool.protected_bytes
        assert pool.reclaim(int(share * free))
        assert pool.used_bytes <= before - int(share * free)

    @precondition(lambda self: not self.calls)
    @rule()
    def change_model(self) -> None:
        for resident in self.engine.models.by_name.values():
            if resident.has_work:
                self.engine.step()
        self.settle()
        self.model = "other" if self.model == "tiny" else "tiny"
        self.load(self.model)

    # What happens where something outlives the engine

    @precondition(lambda self: self.open_store is not None and self.idle_sessions())
    @rule(data=st.data(), wait=st.booleans())
    def persist(self, data: DataObject | None, wait: bool) -> None:
        handle = self.pick(data, self.idle_sessions())
        session, state = self.engine.sessions.sessions[handle], (self.logs[handle], self.after[handle])

        def told(event: Event) -> bool:
            if isinstance(event, Persisted):
                self.seen["persisted"] += 1
                if handle in self.logs:
                    self.saved[handle] = state
            else:
                assert isinstance(event, Failed)
                assert isinstance(event.error, InvalidRequest | UnknownSession), event.error
            return True

        self.engine.handle(Persist(hear(self.engine, told), session.tenant, handle, ""))
        if wait:
            self.io.run_all()
            self.settle()

    @precondition(lambda self: self.open_store is not None)
    @rule()
    def restart(self) -> None:
        """As after a kill: what was not acknowledged may be there or not, so here nothing is under way."""
        self.io.run_all()
        self.settle()
        self.take_stats()
        self.engine.close(0.0)
        self.calls, self.busy = {}, {}
        self.begin_engine()
        self.seen["restarts"] += 1
        there = {h: s.info for h, s in self.engine.sessions.sessions.items()}
        assert {h: i.num_tokens for h, i in there.items()} == {h: len(log) for h, (log, _) in self.saved.items()}
        self.logs = {handle: log for handle, (log, _) in self.saved.items()}
        self.after = {handle: after for handle, (_, after) in self.saved.items()}

    @precondition(lambda self: self.open_store is not None and self.idle_sessions())
    @rule(data=st.data(), text=st.integers(0, 2), n=st.integers(1, 10), most=st.integers(1, 30))
    def come_back(self, data: DataObject | None, text: int, n: int, most: int) -> None:
        self.persist(data, True)
        self.restart()
        if self.idle_sessions():
            self.turn(data, text, n, most, True, True)
            self.drain()

    def take_stats(self) -> None:
        stats = self.engine.stats
        self.seen.update(restored=stats.restored, offloaded=stats.offloaded)
        self.seen.update(evictions=stats.evictions, preemptions=stats.preemptions, cached=stats.cached_tokens)
        caches = [resident.scheduler.cache for resident in self.engine.models.by_name.values()]
        self.seen.update(shared=sum(cache.shared.num_made for cache in caches if cache is not None))

    # All of it once, where chance is not to be relied on

    def story(self) -> None:
        """Every event that these machines prove something of, in an order that brings it about; ends the machine."""
        for event in self.events():
            event()
            self.nothing_is_lost_or_mistaken()
        self.teardown()

    def events(self) -> Iterator[Callable[[], object]]:
        yield lambda: self.begin(5, 1)
        for i in range(4):  # more rows that grow than tight memory has room for
            yield partial(self.submit, TEXTS[i % 3][: 60 + i], 100, Turn("ann"))
        yield partial(self.step, 6)
        yield self.drain
        yield lambda: self.repeat(1, 12, 4, "bob")
        yield lambda: self.converse(None, 2, 9, 6)
        yield lambda: self.converse(None, 1, 70, 20)
        yield lambda: self.fork(None, 2)
        yield lambda: self.turn(None, 0, 7, 20, keep=True, queue=True)
        yield partial(self.step, 6)
        yield lambda: self.fork(None, 1)  # while it generates
        yield self.drain
        if self.open_store is not None:
            yield lambda: self.come_back(None, 0, 8, 5)
            yield lambda: self.converse(None, 2, 9, 6)
        yield lambda: self.evict(1.0)
        yield lambda: self.converse(None, 2, 9, 6)
        yield lambda: self.close(None)
        yield self.change_model
        yield lambda: self.generate(0, 20, 5, "ann")
        yield self.drain

    # What always holds

    @invariant()
    def nothing_is_lost_or_mistaken(self) -> None:
        self.engine.check_integrity()
        sessions = self.engine.sessions.sessions
        assert {h: s.log or self.logs[h] for h, s in sessions.items()} == self.logs
        assert all(s.log or s.on_disk_only or not self.logs[h] for h, s in sessions.items())
        assert {h: s.after for h, s in sessions.items()} == self.after
        for session in sessions.values():
            if session.leaf is not None and session.leaf.resident:
                self.check_kept(session)

    def teardown(self) -> None:
        for _ in range(50_000):  # tight memory runs calls one after another, and computes some again
            if not self.engine.has_work and not self.io.work:
                break
            if not self.advance():
                self.now += 100
        self.now += 10**6
        self.engine.step()
        self.io.run_all()
        assert not self.engine.has_work
        assert not self.engine.sessions.sessions
        persistence = self.engine.persistence
        if persistence is not None:
            on_its_way = (
                persistence.offload.queue_bytes,
                persistence.writing,
                persistence.references,
                persistence.restoring.fetches,
            )
            assert not any(on_its_way), f"something never came to the disk: {on_its_way}"
        self.take_stats()
        self.engine.check_integrity()
        assert self.engine.cache.pool.reclaim(self.engine.cache.pool.used_bytes)
        assert self.engine.ledger.used_bytes == 0
