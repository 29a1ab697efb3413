"""The same rows on two sides in one thread: on this engine, and on mlx_lm's BatchGenerator. No row ends by itself."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from mlx_mcp.core.ports import LoadedModel, LoadProgress, PreparedModel
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.messages import Cancel, Event, Failed, Finished, Load, Loaded, Submit, Token
from mlx_mcp.mlx_backend.runner import Runner

ROOM = 512  # tokens that each row can give: more than any measurement has steps
NAME = "m"  # of the model, in an engine that has no other
LOAD = -1  # the call that loads the model; rows count from 0


@dataclass(frozen=True)
class Subject:
    """A model in memory, and what its keys and values may take."""

    loaded: LoadedModel
    model: Any
    kv_bits: int | None
    max_kv_bytes: int


class Side(Protocol):
    """What both sides do."""

    def add(self, prompt: list[int]) -> int:
        """Submit a row; returns its number."""

    def step(self) -> None:
        """Compute one step."""

    def answered(self, rows: list[int]) -> bool:
        """Whether each of these rows has given a token."""

    def close(self) -> None:
        """End the rows, and free what they hold."""


class Given:
    """Gives the engine a model that is in memory already."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def materialise(self, prepared: PreparedModel) -> Generator[LoadProgress, None, LoadedModel]:
        """See ModelLoader.materialise."""
        yield LoadProgress("reading")
        return self.loaded

    def close(self) -> None:
        """See ModelLoader.close."""


class Ours:
    """Rows on the engine, which reads prompts in passes of `pass_tokens`.

    Raises:
        MlxMcpError: from `add` and `step`: a row cannot be computed.
    """

    def __init__(self, subject: Subject, pass_tokens: int) -> None:
        runner = Runner(subject.model, subject.kv_bits, pass_tokens)
        endless = replace(subject.loaded, name=NAME, runner=runner, stop_ids=frozenset(), context_tokens=1 << 20)
        loader: Any = Given(endless)
        limits = Limits(
            chunk_tokens=pass_tokens, prefill_tokens_idle=max(512, pass_tokens), prefill_tokens_busy=pass_tokens
        )
        self.engine = Engine(loader, limits, endless.weights_bytes + 1, subject.max_kv_bytes)
        self.engine.tell(self._hear)
        self.rows = 0
        self._answered: set[int] = set()
        self._loaded = False
        nothing: Any = None
        self.engine.handle(Load(LOAD, PreparedModel(NAME, Path(), {}, nothing, 0)))
        while self.engine.models.loads:
            self.engine.step()
        assert self._loaded, "a model that is in memory was not loaded"

    def add(self, prompt: list[int]) -> int:
        """See Side.add."""
        row, self.rows = self.rows, self.rows + 1
        self.engine.handle(Submit(row, NAME, tuple(prompt), SamplingParams(ROOM)))
        return row

    def step(self) -> None:
        """See Side.step."""
        self.engine.step()

    def answered(self, rows: list[int]) -> bool:
        """See Side.answered."""
        return self._answered.issuperset(rows)

    def close(self) -> None:
        """See Side.close."""
        for row in range(self.rows):
            self.engine.handle(Cancel(row))

    def _hear(self, row: int, event: Event) -> bool:
        if isinstance(event, Failed):
            raise event.error
        assert not isinstance(event, Finished), f"row {row} has ended while it was measured"
        if isinstance(event, Token):
            self._answered.add(row)
        self._loaded |= isinstance(event, Loaded)
        return True


@dataclass
class Theirs:
    """The same rows on mlx_lm's BatchGenerator, which reads prompts in passes of `pass_tokens`."""

    subject: Subject
    pass_tokens: int
    answers: set[int] = field(default_factory=set)
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator: Any = BatchGenerator(self.subject.model, max_tokens=ROOM, prefill_step_size=self.pass_tokens)

    def add(self, prompt: list[int]) -> int:
        """See Side.add."""
        row: int
        (row,) = self.generator.insert([prompt])
        self.rows.append(row)
        return row

    def step(self) -> None:
        """See Side.step."""
        self.answers |= {response.uid for response in self.generator.next()[1]}

    def answered(self, rows: list[int]) -> bool:
        """See Side.answered."""
        return self.answers.issuperset(rows)

    def close(self) -> None:
        """See Side.close."""
        self.generator.remove(self.rows)
        self.generator.close()
        mx.clear_cache()


def wait(*sides: Side) -> None:
    """Return when nothing is being computed any more. Both sides run a step ahead."""
    mx.synchronize()
    for side in sides:
        if isinstance(side, Theirs):
            mx.synchronize(side.generator.stream)
