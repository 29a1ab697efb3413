"""What the engine asks of the layers it may not import. Every port has a real form and a fake in the tests.

Threads are part of each contract: a runner and a loader's `materialise` belong to the engine thread; a tokenizer may be
used from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlx_mcp.chat.answer import Piece
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Grammar, Prompt, Reasoning
from mlx_mcp.core.layout import Form, Layout, Logits, Payload
from mlx_mcp.core.sequence import Constraint, TokenLogprobs
from mlx_mcp.core.slots import KvCost
from mlx_mcp.core.steps import Cut, Step


@dataclass(frozen=True)
class ModelSpec:
    """Where a model's files are, before any is read: a folder, or a hub repository that may have to be downloaded."""

    name: str
    source: str  # "embedded", "folder" or "hub"
    location: str  # a path, or a hub id such as "mlx-community/Qwen3-4B-4bit"
    summary: str = ""
    may_fetch: bool = False  # the user named it, so what is missing of it may be downloaded


@dataclass(frozen=True)
class StepResult:
    """What a step produced, by sequence id: the next token, or why there is none."""

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # of the rows that asked for them
    failed: dict[int, str] = field(default_factory=dict)
    payloads: dict[Cut, Payload] = field(default_factory=dict)  # of the step's cuts
    logits: dict[int, Logits] = field(default_factory=dict)  # of the rows whose prompts the step has read to the end


class AnswerReader(Protocol):
    """Turns one sequence's tokens into text as they come, split into reasoning, answer and tool calls."""

    def add(self, token_id: int) -> list[Piece]:
        """The text that became certain with this token: never half a character, never a part of a marker."""

    def finish(self, cut: bool = False) -> list[Piece]:
        """What was held back; `cut` says that max_tokens ended the answer."""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that are whole by now."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know of how the answer was read, in whole sentences."""


def never() -> bool:
    """Whoever asked for something still waits for it."""
    return False


class ChatTokenizer(Protocol):
    """A model's vocabulary and chat template.

    What may take long ends within a limit, and soon after `gone()` has become true: nobody waits for it any more.

    Raises:
        Abandoned: `gone` became true.
        CapacityError: as much of this work as may be done at once is under way.
    """

    def encode_chat(
        self,
        messages: list[Message],
        tools: tuple[dict[str, Any], ...] = (),
        reasoning: Reasoning | None = None,
        gone: Callable[[], bool] = never,
    ) -> Prompt:
        """The prompt, generation prompt included; text in `messages` can never become a special token.

        `tools` are function definitions in OpenAI's form. `reasoning` sets the switch that the template has for it.

        Raises:
            InvalidRequest: the model's template refuses these messages, or knows no tools.
        """

    def encode_context(
        self, messages: list[Message], tools: tuple[dict[str, Any], ...] = (), gone: Callable[[], bool] = never
    ) -> Prompt:
        """The ids of messages that turns go on from: the last one, if it is a user's or an assistant's, stays open.

        A turn's text goes on in an open user's message, with nothing put between. After any other role's message a
        user's is opened.

        Raises:
            InvalidRequest: the model's template refuses these messages, does not let them be gone on from, or knows no
                tools.
        """

    def encode_turn(
        self,
        messages: list[Message],
        after: str,
        tools: tuple[dict[str, Any], ...] = (),
        reasoning: Reasoning | None = None,
        gone: Callable[[], bool] = never,
    ) -> Prompt:
        """The ids that a turn appends to a log, generation prompt included; no text becomes a special token.

        It is a user's message, or results of the calls that the log ends in and perhaps more messages. `after` is the
        role of the message that the log ends in, still open: "assistant" for an answer whose stop token was not fed,
        "user" for a context. `tools` are the log's; they are not told again.

        Raises:
            InvalidRequest: the model's template does not let a chat be gone on from, or not by such messages.
        """

    def decode(self, ids: tuple[int, ...]) -> str:
        """How tokens read, control tokens included."""

    @property
    def digest(self) -> bytes:
        """Of what the token ids mean: the same for tokenizers that read every id alike."""

    def transcript(self, ids: tuple[int, ...]) -> str:
        """A log in words, as JSON: control tokens apart from text."""

    def reader(self, prompt: Prompt, tools: tuple[dict[str, Any], ...] = (), plain: bool = False) -> AnswerReader:
        """A fresh one, for one answer to `prompt`; `plain` takes all text for the answer."""

    def token_text(self, token_id: int) -> str:
        """How a single token reads."""

    def compile(self, grammar: Grammar, vocab_size: int, gone: Callable[[], bool] = never) -> Constraint:
        """A fresh constraint over a model's `vocab_size` token ids; may take long for a large grammar.

        Raises:
            InvalidRequest: the grammar is malformed, or too large; with the place.
        """


class ModelRunner(Protocol):
    """Computes steps for one model, and owns the keys and values of its live rows.

    What it knows of a row is what steps have said of it. Steps may overlap: the next one may be launched before this
    one's result is collected, if it says that its rows take their tokens from this one, of which none `must_wait`.
    """

    @property
    def cost(self) -> KvCost:
        """What a row costs."""

    @property
    def num_rows(self) -> int:
        """Rows that hold keys and values now."""

    @property
    def kv_bytes(self) -> int:
        """What the rows' keys and values take now."""

    @property
    def layout(self) -> Layout:
        """How its rows can be cut and put back."""

    def constrain(self, sequence_id: int, constraint: Constraint) -> None:
        """Hold a sequence to a grammar, from before its first step until it is released, preempted or not."""

    def must_wait(self, sequence_id: int) -> bool:
        """Whether drawing an admitted row's next token needs its last one on the host.

        Also whether the row must not be ahead of its tokens because it has windows or states, which cannot go back.
        """

    def cut(self, sequence_id: int, start: int, end: int, state: bool) -> Payload:
        """Copy tokens [start, end) out of a row between steps; takes at most `cost.cut_bytes(end - start, state)`.

        At least `end` tokens of it are computed, and exactly `end` if `state` is set, which takes the states too.
        Tokens that a window has lost are left out.
        """

    def unpack(self, stored: StoredBlock) -> Callable[[], Payload]:
        """Take a packed payload's bytes over, on any thread; what comes back makes it a payload, on the engine thread.

        Raises:
            ValueError: these are no payload of this model.
        """

    def launch(self, step: Step) -> Flight:
        """Start computing every chunk and every decoding row; only a prompt's last chunk yields a token."""

    def release(self, sequence_id: int) -> None:
        """Free a row of a sequence that has ended; unknown ids are ignored, since one may end before its first step."""

    def reset(self) -> None:
        """Free every row: after an exception nothing that a step may have touched is trusted.

        Sequences that were held to grammars still are, when they are admitted again.
        """


class Flight(Protocol):
    """A step that is being computed."""

    def collect(self) -> StepResult:
        """Wait for its tokens."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    name: str
    runner: ModelRunner
    tokenizer: ChatTokenizer
    stop_ids: frozenset[int]
    vocab_size: int
    context_tokens: int
    weights_bytes: int
    fingerprint: bytes  # of all that its keys and values depend on: weights, tokenizer, how they are stored
    defaults: dict[str, float] = field(default_factory=dict)  # sampling that its makers recommend; see core.sampling


class ModelRegistry(Protocol):
    """Which models can be served."""

    def resolve(self, name: str | None) -> ModelSpec:
        """The model of that name, or the default one; may read the disk.

        Raises:
            UnknownModel: there is none.
        """

    def at_hand(self, name: str | None) -> ModelSpec | None:
        """What `resolve` returns, if that is known without reading the disk."""


@dataclass(frozen=True)
class PreparedModel:
    """A model whose files are here and checked, and whose tokenizer is read; its weights are not."""

    name: str
    folder: Path
    config: dict[str, Any]
    tokenizer: ChatTokenizer
    weights_bytes: int


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is: what is being done, and how many of how many bytes are done where that can be told."""

    doing: str  # such as "fetching"
    done_bytes: int = 0
    total_bytes: int | None = None


# Takes the progress of a load. It raises Abandoned when nobody waits for the load any more.
Report = Callable[[LoadProgress], None]


class ModelLoader(Protocol):
    """Makes a runner of a model's files, in two parts, so that a load never stops the rows that run."""

    def prepare(self, spec: ModelSpec, report: Report) -> PreparedModel:
        """Fetch and check the files, read the tokenizer: minutes, on any thread but the engine's.

        Leaves nothing on that thread that belongs to MLX.

        Raises:
            ModelError: the files are missing, broken or not supported.
            Abandoned: `report` raised it. What was fetched so far is kept, and the next call goes on from there.
        """

    def materialise(self, prepared: PreparedModel) -> Generator[LoadProgress, None, LoadedModel]:
        """Read the weights a slice at a time, on the engine thread; yields the bytes done, returns the model.

        Raises:
            ModelError: the weights do not fit the architecture, or cannot be read.
        """

    def close(self) -> None:
        """Let go of what MLX keeps for the calling thread, which is about to end."""


@dataclass(frozen=True)
class StoredBlock:
    """A block as bytes, as a tier keeps it."""

    key: bytes  # its chained hash, which stands for model, tenant, and every token up to its end
    parent: bytes  # the hash of the block before it, or of the root
    start: int  # the position of its first token
    tokens: tuple[int, ...]
    window_start: int  # see Payload
    has_state: bool
    form: Form  # what the bytes are
    data: tuple[memoryview, ...]  # flat views of bytes; laid end to end they are the payload

    @property
    def nbytes(self) -> int:
        """What its payload takes."""
        return sum(view.nbytes for view in self.data)


@dataclass(frozen=True)
class TierEntry:
    """What a tier knows of a block without reading it."""

    nbytes: int
    window_start: int
    has_state: bool


class BlockTier(Protocol):
    """Where blocks live outside the engine's memory. What is damaged or gone is a miss and a count, never an error."""

    def find(self, key: bytes) -> TierEntry | None:
        """Whether a block is there; never waits, from any thread."""

    def put(self, blocks: Seq[StoredBlock]) -> int:
        """Keep blocks, durably once this returns; returns the bytes written, of blocks that were not there (as rich).

        Raises:
            StorageError: they cannot be written now; what was there before still is.
        """

    def get(self, keys: Iterable[bytes]) -> list[StoredBlock]:
        """Blocks in this order, up to the first that is not there or not sound."""
