"""What a model keeps of each token, as far as the cache must know. Knows no arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Layout:
    """Which of a model's keys and values can be cut at a token, and which only where a snapshot was taken.

    Layers that keep every token can be cut anywhere; those that keep the last `windows` tokens wherever these are
    still there; `states` are whole, and go on only from where they were taken.
    """

    windows: tuple[int, ...] = ()  # tokens that each kind of WINDOW layer keeps
    states: bool = False
    sharing: bool = False  # whether rows can share one copy of a prefix
    sharing_rows: int = 0  # from how many rows on that is worth it, as measured on this backend; 0 is never
    refused: str = ""  # why nothing of this model is reused; empty where it is


class Payload(Protocol):
    """Keys and values of a run of tokens, cut out of a row; never changed again."""

    @property
    def nbytes(self) -> int:
        """What it takes."""

    @property
    def window_start(self) -> int:
        """WINDOW layers have the tokens from this position on to the end; the end if they have none."""

    @property
    def has_state(self) -> bool:
        """Whether the states as they were after its last token are in it (true where the model has none)."""

    def pack(self) -> tuple[str, tuple[memoryview, ...]]:
        """What its bytes are, in words that `ModelRunner.unpack` reads, and the bytes, which are not copied."""


class Logits(Protocol):
    """What the token after some tokens is drawn from; never changed again."""

    @property
    def nbytes(self) -> int:
        """What they take."""


@dataclass(frozen=True)
class PromptEnd:
    """The logits after the first `num_tokens` tokens of a prompt, which were all: asked again, it takes no pass."""

    num_tokens: int
    logits: Logits


@dataclass(frozen=True)
class Part:
    """The first `num_tokens` tokens of a payload."""

    payload: Payload
    num_tokens: int
