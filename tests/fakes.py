"""Stand-ins for the ports, with no MLX behind them: what they compute can be told by looking at them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mcp.chat.answer import Piece, TextKind
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Holding, Prompt, Reasoning
from mlx_mcp.core.durable import SessionHead, SessionRecord, Store, Transfer
from mlx_mcp.core.layout import CacheKind, Form, LayerCache, Layout, Logits, Payload, Tensor
from mlx_mcp.core.ports import (
    AnswerReader,
    BlockTier,
    ChatTokenizer,
    Flight,
    LoadedModel,
    LoadProgress,
    ModelLoader,
    ModelRegistry,
    ModelRunner,
    ModelSpec,
    PreparedModel,
    Report,
    StepResult,
    StoredBlock,
    never,
)
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import Constraint, SamplingParams
from mlx_mcp.core.slots import KvCost, SharedPrefix
from mlx_mcp.core.steps import Restore, Step
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.engine import Engine, EngineOptions
from mlx_mcp.engine.io_thread import IoThread
from mlx_mcp.engine.persistence import PersistenceOptions, Persisting
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import InvalidRequest, StorageError, UnknownModel
from mlx_mcp.storage.memory_tier import MemoryTier

STOP_ID = 0
EFFORTS = (Reasoning.LOW, Reasoning.MEDIUM, Reasoning.HIGH)
NO_EFFORTS = "It thinks as long as it likes."
Tools = tuple[dict[str, Any], ...]
MARKERS = {"[": TextKind.REASONING, "]": TextKind.ANSWER, "{": TextKind.TOOL_CALL, "}": TextKind.ANSWER}


class FakeTokenizer:
    """One token per character, its code point; a chat is its texts end to end.

    Text in [brackets] is reasoning, which is left out of the chat if there shall be none, and cannot be made longer or
    shorter; {name} calls a tool.
    """

    def encode_chat(
        self,
        messages: list[Message],
        tools: Tools = (),
        reasoning: Reasoning | None = None,
        gone: Callable[[], bool] = never,
    ) -> Prompt:
        text = "".join(message.text for message in messages)
        text = re.sub(r"\[.*?\]", "", text) if reasoning is Reasoning.OFF else text
        return Prompt(tuple(map(ord, text)), notes=(NO_EFFORTS,) if reasoning in EFFORTS else ())

    def encode_context(self, messages: list[Message], tools: Tools = (), gone: Callable[[], bool] = never) -> Prompt:
        return Prompt(tuple(map(ord, "".join(message.text for message in messages))))

    def encode_turn(
        self,
        messages: list[Message],
        after: str,
        tools: Tools = (),
        reasoning: Reasoning | None = None,
        gone: Callable[[], bool] = never,
    ) -> Prompt:
        """A turn after an answer begins with a bar."""
        text = "".join(message.text for message in messages)
        return Prompt(tuple(map(ord, text if after == "user" else f"|{text}")))

    def encode_raw(self, text: str, gone: Callable[[], bool] = never) -> Prompt:
        return Prompt(tuple(map(ord, text)))

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))

    digest = b"letters"

    def transcript(self, ids: tuple[int, ...], begins: tuple[int, ...] = ()) -> str:
        parts: list[Any] = [self.decode(ids[: begins[0]] if begins else ids)]
        for begin, end in zip(begins, (*begins[1:], len(ids)), strict=True):
            parts += [["", begin], self.decode(ids[begin:end])]
        return json.dumps(parts)

    def reader(self, prompt: Prompt, tools: Tools = (), plain: bool = False) -> FakeReader:
        return FakeReader({} if plain else MARKERS)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    call_tokens = (ord("{"),)
    control_ids: frozenset[int] = frozenset()
    knows_thoughts = False

    def hold(
        self, prompt: Prompt, holding: Holding, vocab_size: int, gone: Callable[[], bool] = never
    ) -> Constraint | None:
        """A grammar holds an answer, and nothing else does."""
        if holding.grammar is None:
            return None
        if holding.grammar.source == "malformed":
            raise InvalidRequest("The grammar is malformed.")
        return FakeConstraint()


@dataclass
class FakeReader:
    markers: dict[str, TextKind]
    kind: TextKind = TextKind.ANSWER
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    notes: tuple[str, ...] = ()

    def add(self, token_id: int) -> list[Piece]:
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

    def finish(self, cut: bool = False) -> list[Piece]:
        self.notes = ("cut off",) if cut else ()
        return [Piece(TextKind.ANSWER, "{" + self.name)] if self.kind is TextKind.TOOL_CALL else []


class FakeConstraint:
    """Allows everything."""

    awake = True

    def mask(self) -> bytes:
        return b"\xff" * (0x110000 // 8)

    def accept(self, token_id: int) -> None:
        pass


def letters_of(num_tokens: int, wide: bool = False) -> Form:
    """What a fake's bytes are: one for each letter, or four if there are others than Latin ones."""
    return Form((LayerCache(CacheKind.FULL),), (Tensor("letters", "U32" if wide else "U8", (num_tokens,)),))


ENCODINGS = {False: "latin-1", True: "utf-32-le"}


@dataclass(frozen=True)
class FakePayload:
    """Keeps the tokens themselves: what is restored from it can be compared with what it should be."""

    tokens: tuple[int, ...]
    window_start: int
    has_state: bool

    @property
    def nbytes(self) -> int:
        return len(self.tokens)

    def pack(self) -> tuple[Form, tuple[memoryview, ...]]:
        wide = max(self.tokens, default=0) > 255
        data = "".join(map(chr, self.tokens)).encode(ENCODINGS[wide])
        return letters_of(len(self.tokens), wide), (memoryview(data),)


@dataclass(frozen=True)
class FakeLogits:
    """Those after these tokens."""

    tokens: tuple[int, ...]
    nbytes: int = 3


def letters(kept: Payload | Logits) -> tuple[int, ...]:
    """The tokens that a fake's payload is of, or its logits come after."""
    assert isinstance(kept, FakePayload | FakeLogits)
    return kept.tokens


@dataclass
class FakeRow:
    """What a runner was told of a row, and what it has drawn since."""

    prompt_ids: tuple[int, ...]
    output_ids: list[int]
    params: SamplingParams
    prefix: SharedPrefix | None
    capacity: int  # of its slot

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt_ids, *self.output_ids)

    @property
    def num_shared(self) -> int:
        return 0 if self.prefix is None else self.prefix.num_tokens


@dataclass
class FakeRunner:
    """Answers each prompt, or the last turn of it, with its own text, over and over if it must; records every step.

    What it answers a turn with can be scripted by `says`.

    A test may hold it before any step with `gate`, break a row with `broken`, break whole steps with `explode`, or let
    steps run ahead of their tokens with `ahead`. A token costs one byte. A row's keys and values are its tokens: it is
    an error to restore others than the sequence has.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    steps: list[Step] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)  # sequence id → tokens computed
    live: dict[int, FakeRow] = field(default_factory=dict)  # of those that were admitted
    constraints: dict[int, Constraint] = field(default_factory=dict)
    constrained: list[Constraint] = field(default_factory=list)  # all that there ever were
    prefixes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # shared prefix → its tokens
    broken: set[int] = field(default_factory=set)
    explode: Exception | None = None
    endless: bool = False
    ahead: bool = False
    kv_bytes: int = 0
    layout: Layout = field(default_factory=lambda: Layout(sharing=True))
    cost: KvCost = field(default_factory=lambda: KvCost(token_bytes=1))
    num_computed: int = 0  # tokens, of all rows
    says: Callable[[str], str] = str  # the last turn → the answer

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def constrain(self, sequence_id: int, constraint: Constraint) -> None:
        self.constraints[sequence_id] = constraint
        self.constrained.append(constraint)

    def must_wait(self, sequence_id: int) -> bool:
        return not self.ahead

    def launch(self, step: Step) -> FakeFlight:
        self.steps.append(step)
        assert self.gate.wait(10)
        for sequence_id in step.released:
            self._free(sequence_id)
        for each in step.admitted:
            assert each.sequence_id not in self.live, "a row that begins twice"
            self.live[each.sequence_id] = FakeRow(
                each.prompt_ids, list(each.output_ids), each.params, each.prefix, each.slot.capacity
            )
        assert self.live.keys() >= set(step.rows), "rows that were never admitted"
        for move in step.moves:
            row = self.live[move.sequence_id]
            row.capacity = move.new.capacity
            assert len(row.tokens) - row.num_shared <= row.capacity
        for restore in step.restores:
            if restore.logits is not None:
                assert letters(restore.logits) == self.live[restore.sequence_id].tokens, "another prompt's logits"
            if restore.num_tokens:
                self._restore(restore)
        for chunk in step.prefill:
            assert self.rows.get(chunk.sequence_id, 0) == chunk.start
            self._compute(chunk.sequence_id, chunk.end - chunk.start)
        for decode in step.decode:
            row, at = self.live[decode.sequence_id], self.rows[decode.sequence_id]
            if decode.token is None:
                assert decode.sequence_id in self.steps[-2].drawing, "a row ahead of a step that it is not in"
            else:
                assert row.tokens[at] == decode.token, "a row is fed what it has not drawn"
            self._compute(decode.sequence_id, 1)
        assert all(cut.end <= self.rows[cut.sequence_id] for cut in step.cuts)
        ends = {(chunk.sequence_id, chunk.end) for chunk in step.prefill}
        assert all((cut.sequence_id, cut.end) in ends for cut in step.cuts if cut.state), "states of another moment"
        return FakeFlight(self, step)

    def _restore(self, restore: Restore) -> None:
        row = self.live[restore.sequence_id]
        tokens = tuple(t for part in restore.parts for t in letters(part.payload)[: part.num_tokens])
        assert tokens == row.tokens[: restore.num_tokens], "another prefix was restored"
        end, needed = 0, restore.num_tokens - max(self.layout.windows, default=0)
        for part in restore.parts:
            start, end = end, end + part.num_tokens
            assert end <= needed or part.payload.window_start <= max(start, needed), "a window with a gap"
        if self.layout.states:
            assert restore.parts[-1].num_tokens == len(letters(restore.parts[-1].payload))
            assert restore.parts[-1].payload.has_state
        if row.prefix is not None:
            first = self.prefixes.setdefault(row.prefix.prefix_id, tokens[: row.num_shared])
            assert first == tokens[: row.num_shared], "a prefix shared with another's"
        self.rows[restore.sequence_id] = restore.num_tokens

    def _compute(self, sequence_id: int, num_tokens: int) -> None:
        row, end = self.live[sequence_id], self.rows.get(sequence_id, 0) + num_tokens
        assert end - row.num_shared <= row.capacity, "a row beyond its slot"
        self.rows[sequence_id] = end
        self.num_computed += num_tokens

    def cut(self, sequence_id: int, start: int, end: int, state: bool) -> FakePayload:
        assert end <= self.rows[sequence_id]
        if self.layout.states and state:
            assert end == self.rows[sequence_id], "states of another moment"
        kept = max([start, *(self.rows[sequence_id] - window for window in self.layout.windows)])
        tokens = self.live[sequence_id].tokens[start:end]
        return FakePayload(tokens, min(kept, end), state or not self.layout.states)

    def unpack(self, stored: StoredBlock) -> Callable[[], Payload]:
        wide = stored.form == letters_of(stored.nbytes // 4, True)
        if not wide and stored.form != letters_of(stored.nbytes):
            raise ValueError("no letters")
        tokens = tuple(map(ord, b"".join(stored.data).decode(ENCODINGS[wide])))
        return lambda: FakePayload(tokens, stored.window_start, stored.has_state)

    def release(self, sequence_id: int) -> None:
        self.constraints.pop(sequence_id, None)
        self._free(sequence_id)

    def _free(self, sequence_id: int) -> None:
        self.live.pop(sequence_id, None)
        self.rows.pop(sequence_id, None)
        if not self.rows:
            self.prefixes.clear()

    def reset(self) -> None:
        self.live.clear()
        self.rows.clear()
        self.prefixes.clear()


@dataclass
class FakeFlight:
    runner: FakeRunner
    step: Step

    def __post_init__(self) -> None:
        self.rows = dict(self.runner.live)  # some may end before this is collected

    def collect(self) -> StepResult:
        if self.runner.explode is not None:
            error, self.runner.explode = self.runner.explode, None
            raise error
        result = StepResult()
        for sequence_id in self.step.drawing:
            row = self.rows[sequence_id]
            said = tuple(map(ord, self.runner.says("".join(map(chr, row.prompt_ids)).rpartition("|")[2]) or "|"))
            if said[0] in self.runner.broken:
                result.failed[sequence_id] = "broken"
                continue
            at = len(row.output_ids)
            over = at >= len(said) and not self.runner.endless
            result.tokens[sequence_id] = STOP_ID if over else said[at % len(said)]
        for sequence_id in (chunk.sequence_id for chunk in self.step.prefill if chunk.last):
            if not self.rows[sequence_id].output_ids and sequence_id not in result.failed:
                result.logits[sequence_id] = FakeLogits(self.rows[sequence_id].prompt_ids)
        for sequence_id, token_id in result.tokens.items():
            if token_id != STOP_ID:
                self.rows[sequence_id].output_ids.append(token_id)
        for cut in self.step.cuts:
            state = cut.state or not self.runner.layout.states
            tokens = self.rows[cut.sequence_id].tokens[cut.start : cut.end]
            result.payloads[cut] = FakePayload(tokens, cut.start, state)
        return result


@dataclass
class FakeLoader:
    """Loads any model in three slices; `hold` keeps `prepare` waiting, `fail` makes it fail."""

    runner: FakeRunner = field(default_factory=FakeRunner)
    hold: threading.Event = field(default_factory=threading.Event)
    fail: Exception | None = None
    fail_weights: Exception | None = None
    weights_bytes: int = 100
    context_tokens: int = 100
    defaults: dict[str, float] = field(default_factory=dict)
    prepared: list[str] = field(default_factory=list)
    materialised: list[str] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.hold.set()

    def prepare(self, spec: ModelSpec, report: Report) -> PreparedModel:
        report(LoadProgress("fetching", 120_000_000, 500_000_000))
        self.prepared.append(spec.name)
        assert self.hold.wait(10)
        if self.fail is not None:
            raise self.fail
        return PreparedModel(spec.name, Path(spec.location), {}, FakeTokenizer(), self.weights_bytes, spec.options)

    def materialise(self, prepared: PreparedModel) -> Generator[LoadProgress, None, LoadedModel]:
        yield LoadProgress("reading", 0, self.weights_bytes)
        yield LoadProgress("reading", self.weights_bytes // 2, self.weights_bytes)
        if self.fail_weights is not None:
            raise self.fail_weights
        self.materialised.append(prepared.name)
        return LoadedModel(
            prepared.name,
            self.runner,
            prepared.tokenizer,
            frozenset({STOP_ID}),
            0x110000,
            self.context_tokens,
            prepared.weights_bytes,
            prepared.name.encode(),
            self.defaults,
        )

    def close(self) -> None:
        self.closed = True


class FakeRegistry:
    """Knows `tiny` and `other`, and takes `tiny` for the default."""

    def resolve(self, name: str | None) -> ModelSpec:
        name = name or "tiny"
        if name not in ("tiny", "other"):
            raise UnknownModel(name, ["tiny", "other"])
        return ModelSpec(name, "folder", f"/nowhere/{name}")

    def at_hand(self, name: str | None) -> ModelSpec | None:
        return None if name == "other" else self.resolve(name)


def fake_client(
    loader: FakeLoader | None = None,
    limits: Limits | None = None,
    max_weights_bytes: int = 1000,
    max_kv_bytes: int = 1 << 30,
    open_store: Callable[[], Store] | None = None,
    **keeping: Any,
) -> EngineClient:
    """A client on a real engine thread over fakes, which keeps nothing on disk without a store.

    `keeping` are the fields of EngineOptions.
    """
    its_loader, its_keeping = loader or FakeLoader(), EngineOptions(**keeping)

    def make_engine() -> Engine:
        persisting = None
        if open_store is not None:
            persisting = Persisting(open_store, IoThread(thread.send), PersistenceOptions())
        return Engine(
            its_loader, limits or Limits(), max_weights_bytes, max_kv_bytes, its_keeping, persisting=persisting
        )

    thread = EngineThread(make_engine)
    return EngineClient(thread, FakeRegistry(), its_loader)


class FakeTier(MemoryTier):
    """Takes what is offloaded like everything else."""

    num_evicted = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def put(self, blocks: Seq[StoredBlock], *, offload: bool = False) -> int:
        return super().put(blocks)


def head(record: SessionRecord) -> SessionHead:
    """What a store knows of a session that it has not read."""
    known: Any = {f.name: getattr(record, f.name, len(record.tokens)) for f in fields(SessionHead)}
    return SessionHead(**known)


class FakeStore:
    """A store whose disk is a dict; opening it again finds what was there."""

    num_old = 0

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.tier, self.sessions = FakeTier(limit_bytes), self
        self.records: dict[tuple[str, str], SessionRecord] = {}  # by session and version

    def heads(self) -> list[SessionHead]:
        return [head(record) for record in self.records.values()]

    def load(self, session_id: str, version: str = "") -> SessionRecord | None:
        return self.records.get((session_id, version))

    def persist(self, blocks: Seq[StoredBlock], record: SessionRecord) -> int:
        written = self.tier.put(blocks)
        self.records[record.session_id, record.version] = record
        return written

    def remove(self, session_id: str, version: str | None = None) -> int:
        gone = [key for key in self.records if key[0] == session_id and version in (None, key[1])]
        for key in gone:
            del self.records[key]
        return len(gone)

    def purge(self) -> None:
        self.records.clear()
        self.tier.delete(list(self.tier._blocks))

    def export(self, session_id: str, version: str, transfer: Transfer) -> int:
        raise StorageError("Only what is on a disk goes to other files.")

    def verify_export(self, transfer: Transfer) -> SessionRecord:
        raise StorageError("Only what is on a disk comes from other files.")

    def import_(self, transfer: Transfer, name: str = "") -> SessionHead:
        raise StorageError("Only what is on a disk comes from other files.")

    def close(self) -> None:
        pass


if TYPE_CHECKING:  # mypy proves that each fake has the whole of its port
    _tokenizer: type[ChatTokenizer] = FakeTokenizer
    _reader: type[AnswerReader] = FakeReader
    _constraint: type[Constraint] = FakeConstraint
    _payload: type[Payload] = FakePayload
    _logits: type[Logits] = FakeLogits
    _runner: type[ModelRunner] = FakeRunner
    _flight: type[Flight] = FakeFlight
    _loader: type[ModelLoader] = FakeLoader
    _registry: type[ModelRegistry] = FakeRegistry
    _tier: type[BlockTier] = FakeTier
    _store: type[Store] = FakeStore
