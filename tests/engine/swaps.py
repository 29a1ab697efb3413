"""Callers of several models on one engine, stepped by hand, with a clock that every step moves on."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_mcp.core.ports import LoadedModel, LoadProgress, ModelOptions, ModelSpec, PreparedModel
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.steps import Step
from mlx_mcp.engine.engine import Engine, EngineOptions
from mlx_mcp.engine.messages import (
    Command,
    EncodeAgain,
    Encoded,
    Event,
    Failed,
    Finished,
    Load,
    Loaded,
    Submit,
    Token,
    Turn,
    Unload,
    Waiting,
)
from mlx_mcp.engine.persistence import Persisting
from tests.engine.hearing import hear
from tests.fakes import FakeFlight, FakeLoader, FakeRunner

STEP_S = 0.25
WEIGHTS = 100


@dataclass
class ModelRunner(FakeRunner):
    """Computes only prompts that begin with its model's letter."""

    letter: str = ""

    def launch(self, step: Step) -> FakeFlight:
        for row in step.admitted:
            assert chr(row.prompt_ids[0]) == self.letter, "the row of another model"
        return super().launch(step)


@dataclass
class ModelsLoader(FakeLoader):
    """Gives every model a runner of its own; every load for which `fails` draws true fails."""

    loads: list[str] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    fail_share: float = 0.0

    def materialise(self, prepared: PreparedModel) -> Generator[LoadProgress, None, LoadedModel]:
        self.loads.append(prepared.name)
        fails = prepared.name in self.failing or self.chance.random() < self.fail_share
        yield LoadProgress("reading", 0, WEIGHTS)
        if fails:
            raise OSError("disk gone")
        model = yield from super().materialise(prepared)
        return replace(model, runner=ModelRunner(letter=prepared.name[0]))


@dataclass(eq=False)
class Caller:
    """Makes one call as a client does: has the model loaded, holds it, submits, and does so again if it is told to."""

    house: Models
    name: str
    text: str
    turn: Turn = field(default_factory=Turn)
    max_tokens: int = 20
    began: float = 0.0
    encoding: bool = False  # while it is, it holds its model and does nothing
    submitted: bool = False
    output: str = ""
    events: list[Event] = field(default_factory=list)
    end: Event | None = None
    waited_s: float = 0.0  # for its first token, or its end

    def __post_init__(self) -> None:
        self.call_id, self.began = next(self.house.ids), self.house.now
        self.load()

    def load(self) -> None:
        engine = self.house.engine
        self.hold = next(self.house.ids)
        engine.handle(Load(hear(engine, self.take, self.hold), self.house.prepared(self.name), hold=True))

    def take(self, event: Event) -> bool:
        self.events.append(event)
        match event:
            case Loaded(model):
                assert model.name == self.name
                self.house.ready.append(self)
            case EncodeAgain(loaded):
                assert not loaded
                self.house.again.append(self)
            case Token(token_id):
                self.output += chr(token_id)
                self.waited_s = self.waited_s or self.house.now - self.began
            case Failed() | Finished():
                self.end, self.waited_s = event, self.waited_s or self.house.now - self.began
        return True

    def submit(self) -> None:
        engine, prompt, params = self.house.engine, tuple(map(ord, self.text)), SamplingParams(self.max_tokens)
        if self.submitted:
            after = self.house.after(self.turn)
            engine.handle(Encoded(self.call_id, prompt, params, None, after, self.hold))
        else:
            self.submitted = True
            hear(engine, self.take, self.call_id)
            engine.handle(Submit(self.call_id, self.name, prompt, params, turn=self.turn, hold=self.hold))

    @property
    def waits_for(self) -> list[str]:
        """In what words it was told that it waits."""
        return [e.awaits.words for e in self.events if isinstance(e, Waiting) and e.awaits is not None]


class Models:
    """An engine with room for the weights of `room` models."""

    def __init__(
        self,
        room: int = 1,
        seed: int = 0,
        fail_share: float = 0.0,
        persisting: Persisting | None = None,
        **options: Any,
    ) -> None:
        self.now, self.ids, self.callers = 0.0, itertools.count(1), list[Caller]()
        self.options: dict[str, ModelOptions] = {}
        self.ready, self.again = list[Caller](), list[Caller]()
        self.chance = random.Random(seed)
        self.loader = ModelsLoader(chance=random.Random(seed), fail_share=fail_share, context_tokens=100_000)
        self.engine = Engine(
            self.loader,
            Limits(chunk_tokens=64, max_running=64),
            room * WEIGHTS,
            1 << 30,
            EngineOptions(**{"block_tokens": 4, "max_wait_s": 1e9} | options),
            lambda: self.now,
            persisting,
        )

    def prepared(self, name: str) -> PreparedModel:
        spec = ModelSpec(name, "folder", "/nowhere", options=self.options.get(name, ModelOptions()))
        return self.loader.prepare(spec, lambda line: None)

    def call(self, name: str, text: str = "", **details: Any) -> Caller:
        caller = Caller(self, name, f"{name[0]}{text}", **details)
        self.callers.append(caller)
        return caller

    def ask(self, name: str) -> list[Event]:
        """Load a model because a user asks for that."""
        return self.tell(lambda call_id: Load(call_id, self.prepared(name), asked_for=True))

    def unload(self, name: str) -> Event:
        return self.tell(lambda call_id: Unload(call_id, name))[-1]

    def tell(self, command: Callable[[int], Command]) -> list[Event]:
        """Have the engine carry out a command; returns what it says, now and later."""
        heard: list[Event] = []

        def take(event: Event) -> bool:
            heard.append(event)
            return True

        self.engine.handle(command(hear(self.engine, take)))
        return heard

    def after(self, turn: Turn) -> str:
        session = self.engine.sessions.sessions.get(turn.session)
        return "assistant" if session is None else session.after

    def step(self, seconds: float = STEP_S) -> None:
        """One step of the engine; some of those who wait for nothing but themselves do what they are to do."""
        self.now += seconds
        self.engine.check_time()
        self.engine.step()
        for waiting in (self.again, self.ready):
            for caller in [caller for caller in waiting if not caller.encoding]:
                waiting.remove(caller)
                if caller.end is None:
                    caller.load() if waiting is self.again else caller.submit()
        self.engine.check_integrity()

    def run(self, seconds: float = 10_000.0) -> None:
        """Step until every call has ended and nothing is loaded."""
        end = self.now + seconds
        while any(caller.end is None for caller in self.callers) or self.engine.has_work:
            assert self.now < end, [caller.events[-3:] for caller in self.callers if caller.end is None]
            self.step()

    @property
    def names(self) -> tuple[str, ...]:
        """The models in memory."""
        return tuple(sorted(self.engine.models.by_name))

    @property
    def longest_wait_s(self) -> float:
        return max(caller.waited_s for caller in self.callers)

    @property
    def ends(self) -> Counter[type]:
        return Counter(type(caller.end) for caller in self.callers)
