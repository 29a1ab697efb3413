"""A run of the engine is decided by its commands: recorded, they bring about the same events once more."""

import itertools
import random
from collections import Counter

import pytest

from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.session import SessionOptions
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
    ListSessions,
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
from mlx_mcp.engine.results import StoreOpened, ThreadResult
from mlx_mcp.errors import EngineDead
from tests.engine.hand_io import HandIo
from tests.fakes import FakeLoader, FakeRunner, FakeStore

LIMITS = Limits(max_running=6, chunk_tokens=8, prefill_tokens_idle=16, prefill_tokens_busy=8)
KEEPING = EngineOptions(block_tokens=4, sharing=Sharing(2, 8), max_sessions=50, max_wait_s=200)
TEXTS = ["|" + "".join(chr(97 + (i * i // 3 + start) % 23) for i in range(160)) for start in (0, 7, 11, 14)]
STEP_S = 0.3


class Run:
    """An engine over a store in memory; its clock is the number of its steps, and nobody else tells it anything."""

    def __init__(self, store):
        self.io, self.store = HandIo(), store
        persisting = Persisting(lambda: store, self.io, PersistenceOptions(autosave_s=150), wall_clock=lambda: 0.0)
        self.engine = None
        runner = FakeRunner(ahead=True, endless=True)
        loader = FakeLoader(runner, context_tokens=100_000)
        self.engine = Engine(loader, LIMITS, 150, 900, KEEPING, self.clock, persisting)
        self.engine.tell(self.emit)
        self.commands, self.events = [], []  # each with the number of the step before it

    def clock(self):
        return 0.0 if self.engine is None else STEP_S * self.engine.num_steps

    def emit(self, call_id, event):
        self.events.append((self.engine.num_steps, call_id, comparable(event)))
        return True

    def handle(self, command):
        self.commands.append((self.engine.num_steps, command))
        self.engine.handle(command)
        self.engine.check_integrity()

    def step(self):
        self.engine.step()

    def load(self):
        prepared = self.engine.models.loader.prepare(ModelSpec("tiny", "folder", "/nowhere"), lambda progress: None)
        self.handle(Load(0, prepared))
        while self.engine.has_work:
            self.step()


def comparable(event: Event) -> object:
    """An event without what is another object in another run."""
    if isinstance(event, Failed):
        return type(event.error), str(event.error)
    return event.model.name if isinstance(event, Loaded) else event


class Caller:
    """Does all that callers may do, at random; remembers what it heard."""

    def __init__(self, run: Run, seed: int):
        self.run, self.random, self.ids = run, random.Random(seed), itertools.count(1)
        self.heard, self.sessions, self.generations = Counter(), [], {}
        usual = run.emit

        def emit(call_id, event):
            self.hear(call_id, event)
            return usual(call_id, event)

        run.engine.tell(emit)
        self.again = []

    def hear(self, call_id, event):
        self.heard[type(event).__name__] += 1
        match event:
            case Finished(_, session) if session is not None:
                self.sessions.append(session.session_id)
            case Sessions(infos):
                self.sessions += [info.session_id for info in infos]
            case EncodeAgain():
                self.again.append(call_id)
        if isinstance(event, Finished | Failed):
            self.generations.pop(call_id, None)

    def act(self):
        chance, call_id = self.random, next(self.ids)
        waiting, self.again = self.again, []
        for again in waiting:
            submit = self.generations.get(again)
            if submit is not None:
                after = self.run.engine.sessions.get("ann", submit.turn.session).after
                self.run.handle(Encoded(again, submit.prompt_ids, submit.params, None, after))
        command = None
        session = chance.choice(self.sessions) if self.sessions else ""
        match chance.choice(["say", "say", "open", "turn", "turn", "turn", "fork", "persist", "close", "cancel", "io"]):
            case "say":
                command = self.submit(call_id, Turn("ann"))
            case "open":
                context = chance.choice(["", "user"])
                command = self.submit(call_id, Turn("ann", opens=SessionOptions(), context=context))
            case "turn" if session:
                keep, queue, after = chance.random() < 0.7, chance.random() < 0.8, chance.choice(["assistant", "user"])
                command = self.submit(call_id, Turn("ann", session, after, keep, queue))
            case "fork" if session:
                command = Fork(call_id, "ann", session, chance.randint(1, 2), ())
            case "persist" if session:
                command = Persist(call_id, "ann", session, chance.choice(["", "v1"]))
            case "close" if session and chance.random() < 0.3:
                command = Close(call_id, "ann", (session,))
            case "cancel" if self.generations:
                chosen = chance.choice(list(self.generations))
                kinds = [Cancel(chosen), Finish(chosen, chance.randint(0, 3))]
                command = chance.choice(kinds)
            case "io" if self.run.io.work:
                command = self.run.io.do()
        if command is not None:
            self.run.handle(command)
        for _ in range(chance.choice([0, 0, 1, 2, 6])):
            self.run.step()

    def submit(self, call_id, turn, text="", max_tokens=0):
        text = text or self.random.choice(TEXTS[:2])[: self.random.choice([3, 20, 110])]
        params = SamplingParams(max_tokens or self.random.choice([1, 8, 60]))
        self.generations[call_id] = Submit(call_id, "tiny", tuple(map(ord, text)), params, turn=turn)
        return self.generations[call_id]


def stored_session():
    """A store with a session that another engine has persisted."""
    run = Run(FakeStore())
    run.load()
    run.handle(run.io.do())
    text = tuple(map(ord, TEXTS[0][:30]))
    run.handle(Submit(1, "tiny", text, SamplingParams(4), turn=Turn("ann", opens=SessionOptions("base"))))
    for _ in range(20):
        run.step()
    run.handle(Persist(2, "ann", "base", ""))
    run.handle(run.io.do())
    assert isinstance(run.events[-1][-1], Persisted)
    return run.store


@pytest.fixture
def count_handles(monkeypatch):
    """Have the handles of sessions counted anew; nobody can guess them otherwise."""

    def begin():
        count = itertools.count(1)
        monkeypatch.setattr("mlx_mcp.core.session.handle", lambda: f"s_{next(count)}")

    return begin


def record(seed):
    run = Run(stored_session())
    run.load()
    caller = Caller(run, seed)
    run.handle(ListSessions(next(caller.ids), "ann"))  # waits for the store
    run.handle(run.io.do())
    run.handle(caller.submit(next(caller.ids), Turn("ann", "base", "assistant", keep=True), TEXTS[0][:3], 8))
    for text in TEXTS + TEXTS[:2]:  # they grow out of their places, and there is not room for all
        run.handle(caller.submit(next(caller.ids), Turn("bob"), text[:60], 100))
    for _ in range(120):
        run.step()
    for _ in range(250):
        caller.act()
    for _ in range(1000):
        if run.io.work:
            run.handle(run.io.do())
        run.step()
    run.handle(ListSessions(next(caller.ids), "ann"))
    return run, caller


def replay(commands):
    run = Run(stored_session())
    for step, command in commands:
        while run.engine.num_steps < step:
            run.step()
        if isinstance(command, ThreadResult):
            result = run.io.do()  # what changes the store
            assert result == command
            run.handle(result if isinstance(command, StoreOpened) else command)
        else:
            run.handle(command)
    return run


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_recorded_commands_bring_about_the_same_events_in_a_fresh_engine(count_handles, seed):
    count_handles()
    recorded, caller = record(seed)
    count_handles()
    replayed = replay(recorded.commands)
    assert replayed.events == recorded.events
    assert replayed.engine.stats == recorded.engine.stats
    kinds = Counter(type(command).__name__ for _, command in recorded.commands)
    for kind in ("Fork", "Persist", "Close", "Cancel", "Finish", "Encoded"):
        assert kinds[kind], f"no {kind} was recorded"
    for kind in ("StoreOpened", "SessionRead", "SessionWritten", "BlocksRead", "BlocksWritten"):
        assert kinds[kind], f"nothing came back as {kind}"
    assert recorded.engine.stats.preemptions
    assert min(caller.heard[kind.__name__] for kind in (Token, Prefilled, Finished, Failed, Sessions, Persisted)) > 0


def test_commands_and_what_comes_back_are_values_that_can_be_printed(count_handles):
    count_handles()
    recorded, _ = record(0)
    printed = [repr(command) for _, command in recorded.commands if not isinstance(command, Load | StoreOpened)]
    assert not [line for line in printed if "<function" in line or "<bound method" in line]


def test_an_engine_that_stops_tells_every_call_in_whatever_it_waits(count_handles):
    count_handles()
    run = Run(stored_session())
    run.load()
    run.handle(run.io.do())
    caller = Caller(run, 1)
    for _ in range(60):
        caller.act()
    live = {call.call_id for call in run.engine.calls}
    told = len(run.events)
    run.engine.stop()
    while run.io.work:
        run.engine.handle(run.io.do())
    ended = {call_id for _, call_id, _ in run.events[told:]}
    assert live
    assert live <= ended
    assert not run.engine.calls
    run.engine.handle(Submit(10_000, "tiny", (1,), SamplingParams(1)))
    assert run.events[-1][-1][0] is EngineDead
