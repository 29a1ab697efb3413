"""What a model keeps of each token, as far as the cache must know. Knows no arrays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
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


@dataclass(frozen=True)
class Tensor:
    """An array among a payload's bytes."""

    name: str  # its layer and part, such as "layers.3.keys"
    dtype: str  # as safetensors files name it, such as "BF16"
    shape: tuple[int, ...]


class CacheKind(StrEnum):
    """How a layer keeps what it needs of earlier tokens."""

    FULL = "full"  # keys and values of every token, perhaps quantized
    WINDOW = "window"  # keys and values of the last tokens
    STATE = "state"  # states, which have no tokens


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer."""

    kind: CacheKind
    window: int = 0  # tokens that a WINDOW layer keeps
    group_size: int = 0  # numbers that a FULL layer quantizes together; 0 where it does not
    bits: int = 0  # of each such number


@dataclass(frozen=True)
class Form:
    """What a payload's bytes are: tensors end to end, and the cache of each layer that these belong to.

    `layers` is empty where a layer has several caches.
    """

    layers: tuple[LayerCache, ...]
    tensors: tuple[Tensor, ...]


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

    def pack(self) -> tuple[Form, tuple[memoryview, ...]]:
        """What its bytes are, which `ModelRunner.unpack` reads, and the bytes, which are not copied."""


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
