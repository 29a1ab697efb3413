"""What callers have had of a process since it began: counts and durations, and the generations that go on now.

Every generation passes through `watch`, whatever face it came by. Knows no protocol and no exporter: those who show it
read the counts, and those who must hear of each generation add a listener. Keeps nothing of what was said. One event
loop uses it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakSet

from mlx_mcp.engine.requests import Delta, GenerateRequest, Progress, Result, Update
from mlx_mcp.errors import MlxMcpError
from mlx_mcp.service.activity import Meter
from mlx_mcp.stats import LONG_BOUNDS_S, STEP_BOUNDS_S, WAIT_BOUNDS_S, Distribution, Histogram

__all__ = ["FAULT", "Distribution", "Histogram", "Observer", "Tally", "Watched"]

MAX_LABELS = 100  # different names of one kind; what comes after these is counted as OTHER
OTHER = "other"
FAULT = "fault"  # the kind of an error that is not this package's
CANCELLED = "cancelled"


@dataclass(eq=False)
class Watched:
    """One generation: when what happened, by time.monotonic, and what came of it.

    While it goes on, only the meter's words for what it does and its counts are for others; its text is not.
    """

    number: int
    request: GenerateRequest
    meter: Meter
    group: str  # the connection that it came by
    began_at: float
    began_ns: int  # the same, since 1970
    loaded_at: float | None = None  # when its model was there, if it had to wait for that
    admitted_at: float | None = None  # when the engine began to read its prompt
    first_at: float | None = None  # its first token
    latest_at: float = 0.0  # its latest one
    ended_at: float = 0.0
    num_tokens: int = 0  # that it has generated
    result: Result | None = None
    error: str = ""  # the kind of error that it ended with
    context: object = None  # of whoever listens to generations

    @property
    def outcome(self) -> str:
        """Why it ended: a finish reason, or a kind of error."""
        return self.error if self.result is None else str(self.result.finish_reason)


@dataclass(eq=False)
class RunningWorkflow:
    """A program that asks the models many things: `line` says how far it is, without a word of what is said."""

    number: int
    kind: str  # the tool
    tenant: str
    name: str  # of what it runs in
    began_at: float  # by time.monotonic
    line: Callable[[], str]


@dataclass(eq=False)
class Tally:
    """How often something was asked for, by its name and outcome, and how long each took."""

    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    seconds: dict[str, Histogram] = field(default_factory=dict)

    def add(self, name: str, *outcome: str, seconds: float) -> None:
        """Count one. The name must be one of few."""
        self.counts[(name, *outcome)] += 1
        if name not in self.seconds:
            self.seconds[name] = Histogram(WAIT_BOUNDS_S)
        self.seconds[name].observe(seconds)


class Observer:
    """Counts what callers of one process get."""

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.active: dict[int, Watched] = {}
        self.workflows: list[RunningWorkflow] = []  # that go on
        self.generations: Counter[tuple[str, str]] = Counter()  # by model and outcome
        self.tokens: dict[str, list[int]] = {}  # model → prompt, cached, restored and generated tokens
        self.errors: Counter[str] = Counter()  # by kind: the errors that callers got
        self.ignored: Counter[str] = Counter()  # what callers sent and no API looks at, by names of ours
        self.tools, self.requests = Tally(), Tally()
        self.generation_s, self.first_token_s = Histogram(LONG_BOUNDS_S), Histogram(WAIT_BOUNDS_S)
        self.between_tokens_s = Histogram(STEP_BOUNDS_S)
        # Called when a generation begins, whose `context` they may set, and when one has ended.
        self.beginning: list[Callable[[Watched], None]] = []
        self.ending: list[Callable[[Watched], None]] = []
        self._count = 0
        self._told: WeakSet[MlxMcpError] = WeakSet()  # errors that are counted already
        self._labels: set[str] = set()

    @contextmanager
    def watch(self, request: GenerateRequest, meter: Meter, group: str) -> Iterator[Callable[[Update], None]]:
        """A generation that goes on until the end of the block; what is yielded takes each of its updates."""
        self._count += 1
        now = time.monotonic()
        watched = self.active[self._count] = Watched(self._count, request, meter, group, now, time.time_ns())
        for begin in self.beginning:
            begin(watched)

        def take(update: Update) -> None:
            if isinstance(update, Delta):
                if update.num_tokens > watched.num_tokens:
                    self._note_tokens(watched, update.num_tokens)
            elif isinstance(update, Result):
                watched.result = update
            elif update.phase == "decode":
                self._note_tokens(watched, update.done - meter.read)
            else:
                note_phase(watched, update)

        try:
            yield take
        except MlxMcpError as error:
            watched.error = type(error).__name__
            self.failed(error)
            raise
        except Exception:
            watched.error = FAULT
            self.errors[FAULT] += 1
            raise
        finally:
            if watched.result is None:
                watched.error = watched.error or CANCELLED
            self._end(watched)

    @contextmanager
    def workflow(self, kind: str, tenant: str, name: str, line: Callable[[], str]) -> Iterator[None]:
        """A workflow that goes on until the end of the block."""
        self._count += 1
        running = RunningWorkflow(self._count, kind, tenant, name, time.monotonic(), line)
        self.workflows.append(running)
        try:
            yield
        finally:
            self.workflows.remove(running)

    def failed(self, error: MlxMcpError) -> None:
        """Count an error that a caller gets; one that comes by twice is counted once."""
        if error not in self._told:
            self._told.add(error)
            self.errors[type(error).__name__] += 1

    def label(self, name: str) -> str:
        """The name, or OTHER if there were too many already: what is kept for each name must not grow without end."""
        if name not in self._labels:
            if len(self._labels) >= MAX_LABELS:
                return OTHER
            self._labels.add(name)
        return name

    def _note_tokens(self, watched: Watched, num_tokens: int) -> None:
        """Note that a generation has so many tokens by now."""
        new = num_tokens - watched.num_tokens
        if new <= 0:
            return
        now = time.monotonic()
        if watched.first_at is None:
            watched.first_at = now
            self.first_token_s.observe(now - watched.began_at)
        else:
            self.between_tokens_s.observe((now - watched.latest_at) / new)
        watched.latest_at, watched.num_tokens = now, num_tokens

    def _end(self, watched: Watched) -> None:
        del self.active[watched.number]
        watched.ended_at = time.monotonic()
        result = watched.result
        model = "" if result is None else self.label(result.model)
        self.generations[model, watched.outcome] += 1
        self.generation_s.observe(watched.ended_at - watched.began_at)
        if result is not None:
            counts = self.tokens.setdefault(model, [0, 0, 0, 0])
            of_this = result.prompt_tokens, result.cached_tokens, result.restored_tokens, result.completion_tokens
            counts[:] = [count + more for count, more in zip(counts, of_this, strict=True)]
        for end in self.ending:
            end(watched)


def note_phase(watched: Watched, progress: Progress) -> None:
    """Note what a generation does before its first token."""
    if progress.phase == "loading":
        watched.loaded_at = time.monotonic()
    elif progress.phase == "prefill" and watched.admitted_at is None:
        watched.admitted_at = progress.admitted_at
