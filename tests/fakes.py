"""Stand-ins for the ports, with no MLX behind them: what they compute can be told by looking at them."""

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from mlx_mcp.core.ports import (
    LoadedModel,
    ModelSpec,
    Piece,
    PreparedModel,
    Prompt,
    StepResult,
    TextKind,
    ToolCall,
)
from mlx_mcp.core.scheduler import Limits, Step
from mlx_mcp.core.slots import KvCost
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import InvalidRequest, UnknownModel

STOP_ID = 0
MARKERS = {"[": TextKind.REASONING, "]": TextKind.ANSWER, "{": TextKind.TOOL_CALL, "}": TextKind.ANSWER}


class FakeTokenizer:
    """One token per character, its code point; a chat is its texts end to end.

    Text in [brackets] is reasoning, which is left out of the chat if there shall be none; {name} calls a tool.
    """

    def encode_chat(self, messages, tools=(), reasoning=True):
        text = "".join(message.content for message in messages)
        return Prompt(tuple(map(ord, text if reasoning else re.sub(r"\[.*?\]", "", text))))

    def reader(self, prompt, tools=(), plain=False):
        return FakeReader({} if plain else MARKERS)

    def token_text(self, token_id):
        return chr(token_id)

    def compile(self, grammar, vocab_size):
        if grammar.source == "malformed":
            raise InvalidRequest("The grammar is malformed.")
        return FakeConstraint()


@dataclass
class FakeReader:
    markers: dict
    kind: TextKind = TextKind.ANSWER
    name: str = ""
    tool_calls: tuple = ()

    def add(self, token_id):
        char = chr(token_id)
        if char in self.markers:
            self.kind = self.markers[char]
            if char != "}":
                return []
            name, self.name = self.name, ""
            self.tool_calls += (ToolCall(name, {}),)
            return [Piece(TextKind.TOOL_CALL, name)]
        if self.kind is TextKind.TOOL_CALL:
            self.name += char
            return []
        return [Piece(self.kind, char)]

    def finish(self):
        return [Piece(TextKind.ANSWER, "{" + self.name)] if self.kind is TextKind.TOOL_CALL else []


class FakeConstraint:
    """Allows everything."""

    def mask(self):
        return b"\xff" * (0x110000 // 8)

    def accept(self, token_id):
        pass


@dataclass
class FakeRunner:
    """Answers each prompt with the prompt itself, over and over if it must; records every step.

    A test may hold it before any step with `gate`, break a row with `broken`, break whole steps with `explode`, or let
    steps run ahead of their tokens with `ahead`. A token costs one byte.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    steps: list = field(default_factory=list)
    rows: set = field(default_factory=set)
    broken: set = field(default_factory=set)
    explode: Exception | None = None
    endless: bool = False
    ahead: bool = False
    kv_bytes: int = 0

    def __post_init__(self):
        self.gate.set()

    @property
    def cost(self):
        return KvCost(token_bytes=1)

    @property
    def num_rows(self):
        return len(self.rows)

    def must_wait(self, sequence):
        return not self.ahead

    def launch(self, step):
        self.steps.append(step)
        assert self.gate.wait(10)
        assert all(s.slot is not None for s in step.sequences)
        self.rows |= {s.sequence_id for s in step.sequences}
        return FakeFlight(self, step)

    def release(self, sequence_id):
        self.rows.discard(sequence_id)

    def reset(self):
        self.rows.clear()


@dataclass
class FakeFlight:
    runner: FakeRunner
    step: Step

    def collect(self):
        if self.runner.explode is not None:
            error, self.runner.explode = self.runner.explode, None
            raise error
        result = StepResult()
        for sequence in self.step.drawing:
            if sequence.prompt_ids[0] in self.runner.broken:
                result.failed[sequence.sequence_id] = "broken"
                continue
            at = len(sequence.output_ids)
            over = at >= len(sequence.prompt_ids) and not self.runner.endless
            result.tokens[sequence.sequence_id] = (
                STOP_ID if over else sequence.prompt_ids[at % len(sequence.prompt_ids)]
            )
        return result


@dataclass
class FakeLoader:
    """Loads any model in three slices; `hold` keeps `prepare` waiting, `fail` makes it fail."""

    runner: FakeRunner = field(default_factory=FakeRunner)
    hold: threading.Event = field(default_factory=threading.Event)
    fail: Exception | None = None
    fail_weights: Exception | None = None
    weights_bytes: int = 100
    prepared: list = field(default_factory=list)
    materialised: list = field(default_factory=list)
    closed: bool = False

    def __post_init__(self):
        self.hold.set()

    def prepare(self, spec, report):
        report("fetching")
        self.prepared.append(spec.name)
        assert self.hold.wait(10)
        if self.fail is not None:
            raise self.fail
        return PreparedModel(spec.name, Path(spec.location), {}, FakeTokenizer(), self.weights_bytes)

    def materialise(self, prepared):
        yield 0.0
        yield 0.5
        if self.fail_weights is not None:
            raise self.fail_weights
        self.materialised.append(prepared.name)
        return LoadedModel(
            prepared.name, self.runner, prepared.tokenizer, frozenset({STOP_ID}), 0x110000, 100, prepared.weights_bytes
        )

    def close(self):
        self.closed = True


class FakeRegistry:
    """Knows `tiny` and `other`, and takes `tiny` for the default."""

    def resolve(self, name):
        name = name or "tiny"
        if name not in ("tiny", "other"):
            raise UnknownModel(name, ["tiny", "other"])
        return ModelSpec(name, "folder", f"/nowhere/{name}")


def fake_client(loader=None, limits=None, max_weights_bytes=1000, max_kv_bytes=1 << 30):
    """A client on a real engine thread over fakes."""
    loader = loader or FakeLoader()
    thread = EngineThread(lambda: Engine(loader, limits or Limits(), max_weights_bytes, max_kv_bytes))
    return EngineClient(thread, FakeRegistry(), loader)
