"""What the engine asks of the layers it may not import. Every port has a real form and a fake in the tests.

Threads are part of each contract: a runner and a loader's `materialise` belong to the engine thread; a tokenizer may be
used from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlx_mcp.core.scheduler import Step


@dataclass(frozen=True)
class ModelSpec:
    """Where a model's files are, before any is read: a folder, or a hub repository that may have to be downloaded."""

    name: str
    source: str  # "embedded", "folder" or "hub"
    location: str  # a path, or a hub id such as "mlx-community/Qwen3-4B-4bit"
    summary: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class StepResult:
    """What a step produced, by sequence id: the next token, or why there is none."""

    tokens: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; never half a character."""

    def finish(self) -> str:
        """What was held back."""


class ChatTokenizer(Protocol):
    """A model's vocabulary and chat template."""

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """The prompt's token ids, generation prompt included; text in `messages` can never become a special token.

        Raises:
            ModelError: the model's template refuses these messages.
        """

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one sequence."""


class ModelRunner(Protocol):
    """Computes steps for one model, and owns the keys and values of its live rows."""

    @property
    def num_rows(self) -> int:
        """Rows that hold keys and values now."""

    def run(self, step: Step) -> StepResult:
        """Compute every chunk and every decoding row; only a prompt's last chunk yields a token."""

    def release(self, sequence_id: int) -> None:
        """Free a row; unknown ids are ignored, since a sequence may end before its first step."""


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


class ModelRegistry(Protocol):
    """Which models can be served."""

    def resolve(self, name: str | None) -> ModelSpec:
        """The model of that name, or the default one; may read the disk.

        Raises:
            UnknownModel: there is none.
        """


@dataclass(frozen=True)
class PreparedModel:
    """A model whose files are here and checked, and whose tokenizer is read; its weights are not."""

    name: str
    folder: Path
    config: dict[str, Any]
    tokenizer: ChatTokenizer
    weights_bytes: int


class ModelLoader(Protocol):
    """Makes a runner of a model's files, in two parts, so that a load never stops the rows that run."""

    def prepare(self, spec: ModelSpec, report: Callable[[str], None]) -> PreparedModel:
        """Fetch and check the files, read the tokenizer: minutes, on any thread but the engine's.

        `report` takes a line on what is going on.

        Raises:
            ModelError: the files are missing, broken or not supported.
        """

    def materialise(self, prepared: PreparedModel) -> Generator[float, None, LoadedModel]:
        """Read the weights a slice at a time, on the engine thread; yields the share done, returns the model.

        Raises:
            ModelError: the weights do not fit the architecture, or cannot be read.
        """

    def close(self) -> None:
        """Let go of what belongs to the engine thread, on that thread, just before it ends."""
