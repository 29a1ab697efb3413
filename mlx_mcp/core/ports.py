"""What the engine asks of the layers that it may not import. Every port has a real form, and a fake in the tests.

Threads are part of each contract. A runner and a loader's `materialise` belong to the engine thread. A tokenizer may
be used from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlx_mcp.chat.answer import Piece
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Holding, Prompt, Reasoning
from mlx_mcp.core.layout import Form, Layout, Logits, Payload
from mlx_mcp.core.memory import Budget
from mlx_mcp.core.prefill import Prefill
from mlx_mcp.core.sequence import Constraint, TokenLogprobs
from mlx_mcp.core.slots import KvCost
from mlx_mcp.core.steps import Cut, Step


@dataclass(frozen=True)
class ModelOptions:
    """What a user has set for one model; None is what holds for all."""

    context_tokens: int | None = None  # so many of its context are used
    kv_bits: int | None = None  # in which its keys and values are stored: 8 or 4; 0 for as the model has them
    sampling: Mapping[str, float] = field(default_factory=dict)  # over what its makers recommend; see core.sampling
    ttl_s: float | None = None  # how long it stays in memory without a call
    pinned: bool | None = None  # whether it is never unloaded for others
    adapter: str = ""  # the folder of a LoRA adapter that is put on it


@dataclass(frozen=True)
class ModelSpec:
    """Where a model's files are, before any is read: a folder, or a hub repository that may not be downloaded yet."""

    name: str
    source: str  # "embedded", "folder" or "hub"
    location: str  # a path, or a hub id such as "mlx-community/Qwen3-4B-4bit"
    summary: str = ""
    may_fetch: bool = False  # whether missing files may be downloaded, since the user named the model
    options: ModelOptions = ModelOptions()


@dataclass(frozen=True)
class StepResult:
    """The result of a step, by sequence id: each row's next token, or why it has none."""

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # of the rows that asked for them
    failed: dict[int, str] = field(default_factory=dict)
    payloads: dict[Cut, Payload] = field(default_factory=dict)  # of the step's cuts
    logits: dict[int, Logits] = field(default_factory=dict)  # of the rows whose prompts were read to the end


class AnswerReader(Protocol):
    """Turns one sequence's tokens into text as they come, split into reasoning, answer and tool calls."""

    def add(self, token_id: int) -> list[Piece]:
        """Take a token, and return the text that is certain now: never half a character, never a part of a marker."""

    def finish(self, cut: bool = False) -> list[Piece]:
        """Return the text that was held back; `cut` says that max_tokens ended the answer."""

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that are complete by now."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the caller should know of how the answer was read, in whole sentences."""


def never() -> bool:
    """Return False: the caller still waits."""
    return False


class ChatTokenizer(Protocol):
    """A model's vocabulary and chat template.

    Methods that may take long end within a time limit, and soon after `gone()` is true: then nobody waits any more.

    Raises:
        Abandoned: `gone` became true.
        CapacityError: too much work of this kind is under way already.
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
        """The ids of messages that turns continue: the last one, if it is a user's or an assistant's, stays open.

        A turn's text continues an open user's message, with nothing put between. After a message of any other role a
        user's message is opened.

        Raises:
            InvalidRequest: the model's template refuses these messages, does not let them be continued, or knows no
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
        """The ids that a turn appends to a log, generation prompt included. No text becomes a special token.

        It is a user's message, or results of the calls that the log ends in and perhaps more messages. `after` is the
        role of the message that the log ends in, still open: "assistant" for an answer whose stop token was not fed,
        "user" for a context. `tools` are the log's; they are not told again.

        Raises:
            InvalidRequest: the model's template does not let a chat be continued, or not by such messages.
        """

    def encode_raw(self, text: str, gone: Callable[[], bool] = never) -> Prompt:
        """The ids of a prompt without a chat template: control tokens in it are control tokens.

        Raises:
            InvalidRequest: the tokenizer cannot encode it, or nothing is left of it.
        """

    def decode(self, ids: tuple[int, ...]) -> str:
        """The text of tokens, control tokens included."""

    @property
    def digest(self) -> bytes:
        """A digest of what the token ids mean. Tokenizers that give every id the same text have the same digest."""

    def transcript(self, ids: tuple[int, ...], begins: tuple[int, ...] = ()) -> str:
        """The text of a log, as a JSON list of texts, and between them of lists.

        Such a list has a control token. Where a turn `begins`, it has an empty text and the number of tokens before it.
        """

    def reader(self, prompt: Prompt, tools: tuple[dict[str, Any], ...] = (), plain: bool = False) -> AnswerReader:
        """Make a reader for one answer to `prompt`. With `plain` set, it takes all text for the answer."""

    def token_text(self, token_id: int) -> str:
        """The text of a single token."""

    def hold(
        self, prompt: Prompt, holding: Holding, vocab_size: int, gone: Callable[[], bool] = never
    ) -> Constraint | None:
        """Make the constraint of an answer to `prompt`, over a model's `vocab_size` token ids. It may take long.

        None if the answer is held to nothing: where tools may be called, and their notation has no grammar.

        Raises:
            InvalidRequest: a grammar is malformed, or too large; the text says where. Or calls are required that
                cannot be held to their tools.
        """

    @property
    def knows_thoughts(self) -> bool:
        """Whether the markers of the model's thoughts are known, so that thoughts can be ended."""

    @property
    def control_ids(self) -> frozenset[int]:
        """The control tokens, which no caller's text becomes: between them prompts and answers are text."""

    @property
    def call_tokens(self) -> tuple[int, ...]:
        """The tokens that begin a call and nothing else."""


class ModelRunner(Protocol):
    """Computes steps for one model, and owns the keys and values of its live rows.

    It knows of a row what steps have said of it. Steps may overlap: a step that takes its rows' tokens from the step
    before may be launched before that step's result is collected, if none of its rows `must_wait`.
    """

    @property
    def cost(self) -> KvCost:
        """How many bytes a row takes."""

    @property
    def num_rows(self) -> int:
        """The number of rows that hold keys and values now."""

    @property
    def kv_bytes(self) -> int:
        """The bytes of the rows' keys and values now."""

    @property
    def layout(self) -> Layout:
        """After which tokens its rows can continue from the keys and values of others."""

    def constrain(self, sequence_id: int, constraint: Constraint) -> None:
        """Hold a sequence to a grammar, from before its first step until it is released, even if it is preempted."""

    def must_wait(self, sequence_id: int) -> bool:
        """Whether no step may run ahead of an admitted row: its next draw needs its last token on the host.

        The same is true of a row with windows or states, which cannot go back by a token.
        """

    def cut(self, sequence_id: int, start: int, end: int, state: bool) -> Payload:
        """Copy tokens [start, end) out of a row between steps, in at most `cost.cut_bytes(end - start, state)` bytes.

        At least `end` tokens of the row are computed, and exactly `end` if `state` is set: then the states are copied
        too. Tokens that a window has dropped are left out.
        """

    def unpack(self, stored: StoredBlock) -> Callable[[], Payload]:
        """Take over the bytes of a payload, on any thread; returns a function that makes it, on the engine thread.

        Raises:
            ValueError: the bytes are no payload of this model.
        """

    def launch(self, step: Step) -> Flight:
        """Start to compute every chunk and every decoding row. Of a prompt only the last chunk yields a token."""

    def release(self, sequence_id: int) -> None:
        """Free the row of a sequence that has ended. Nothing is done if it has none, as before its first step."""

    def reset(self) -> None:
        """Free every row. After an exception nothing that a step may have changed is trusted.

        The grammars of sequences stay, for when they are admitted again.
        """


class Flight(Protocol):
    """A step that is being computed."""

    def collect(self) -> StepResult:
        """Wait for its result."""


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
    fingerprint: bytes  # of all that its keys and values depend on: weights, tokenizer, their types
    defaults: dict[str, float] = field(default_factory=dict)  # sampling that its makers recommend; see core.sampling
    prefill: Prefill | None = None  # how its prompts are read; None: as the engine's limits say


class ModelRegistry(Protocol):
    """Which models can be served."""

    def resolve(self, name: str | None) -> ModelSpec:
        """The model of that name, or the default one; may read the disk.

        Raises:
            UnknownModel: there is no such model.
        """

    def at_hand(self, name: str | None) -> ModelSpec | None:
        """What `resolve` returns, if that is known without reading the disk; else None."""


@dataclass(frozen=True)
class PreparedModel:
    """A model whose files are here and checked, and whose tokenizer is read; its weights are not."""

    name: str
    folder: Path
    config: dict[str, Any]
    tokenizer: ChatTokenizer
    weights_bytes: int
    options: ModelOptions = ModelOptions()
    kv_bits: int | None = None  # that its keys and values are stored in; None: as the model has them
    pass_bytes: int = 0  # what a pass of it takes beside them, where that is counted
    budget: Budget | None = None  # how the device's memory is divided; None: as it was


@dataclass(frozen=True)
class LoadProgress:
    """What a load does at the moment, and how many of how many bytes are done, if that is known."""

    doing: str  # such as "fetching"
    done_bytes: int = 0
    total_bytes: int | None = None


# Takes the progress of a load. It raises Abandoned when nobody waits for the load any more.
Report = Callable[[LoadProgress], None]


class ModelLoader(Protocol):
    """Loads models in two parts, so that a load never stops the rows that run."""

    def prepare(self, spec: ModelSpec, report: Report) -> PreparedModel:
        """Fetch and check the files, and read the tokenizer. This may take minutes; not on the engine thread.

        It leaves nothing of MLX on the thread.

        Raises:
            ModelError: the files are missing, broken or not supported.
            Abandoned: `report` raised it. What was fetched so far stays, and the next call continues from there.
        """

    def materialise(self, prepared: PreparedModel) -> Generator[LoadProgress, None, LoadedModel]:
        """Read the weights a slice at a time, on the engine thread. Yields the bytes done, and returns the model.

        Raises:
            ModelError: the weights do not fit the architecture, or cannot be read.
        """

    def close(self) -> None:
        """Free what MLX keeps for the calling thread, which is about to end."""


@dataclass(frozen=True)
class StoredBlock:
    """A block as bytes, as a tier stores it."""

    key: bytes  # its chained hash, which depends on the model, the tenant, and every token up to its end
    parent: bytes  # the hash of the block before it, or of the root
    start: int  # the position of its first token
    tokens: tuple[int, ...]
    window_start: int  # see Payload
    has_state: bool
    form: Form  # how the bytes are to be read
    data: tuple[memoryview, ...]  # flat views of bytes; concatenated they are the payload

    @property
    def nbytes(self) -> int:
        """The size of its payload."""
        return sum(view.nbytes for view in self.data)


@dataclass(frozen=True)
class TierEntry:
    """What a tier knows of a block without reading it."""

    nbytes: int
    window_start: int
    has_state: bool


class BlockTier(Protocol):
    """Where blocks are outside the engine's memory. A block that is damaged or gone is a miss, which is counted."""

    def find(self, key: bytes) -> TierEntry | None:
        """What is known of a block; None if it is not there. Never waits, and may be called from any thread."""

    def put(self, blocks: Seq[StoredBlock]) -> int:
        """Store blocks durably; returns the bytes written, of blocks that were not there, or not as rich.

        Raises:
            StorageError: they cannot be written now; what was there before is still there.
        """

    def get(self, keys: Iterable[bytes]) -> list[StoredBlock]:
        """Read blocks in this order, up to the first that is not there or is damaged."""
