"""Describes how a model keeps its tokens, as far as the cache must know. Knows no arrays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


@dataclass(frozen=True)
class Layout:
    """After which tokens a row can continue from the keys and values of another row.

    Layers that keep every token allow it after any token. Layers that keep the last `windows` tokens allow it where
    these tokens are still there. Recurrent `states` allow it only after the token after which they were copied.
    """

    windows: tuple[int, ...] = ()  # how many tokens each kind of WINDOW layer keeps
    states: bool = False  # whether there are STATE layers
    sharing: bool = False  # whether rows can share one copy of a prefix
    sharing_rows: int = 0  # from how many rows on sharing is faster, as measured on this backend; 0 is never
    refused: str = ""  # why nothing of this model can be reused; empty if it can


@dataclass(frozen=True)
class Tensor:
    """One array in the bytes of a payload."""

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
    """How the bytes of a payload are to be read: the tensors, which are concatenated, and the cache of each layer.

    `layers` is empty where a layer has several caches.
    """

    layers: tuple[LayerCache, ...]
    tensors: tuple[Tensor, ...]


class Payload(Protocol):
    """Keys and values of consecutive tokens, copied out of a row. A payload is never changed."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""

    @property
    def window_start(self) -> int:
        """The position from which on WINDOW layers have their tokens; the end if they have none."""

    @property
    def has_state(self) -> bool:
        """Whether it has the states after its last token (true if the model has no states)."""

    def pack(self) -> tuple[Form, tuple[memoryview, ...]]:
        """Its form, which `ModelRunner.unpack` reads, and its bytes, which are not copied."""


class Logits(Protocol):
    """The logits from which the next token is drawn. They are never changed."""

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""


@dataclass(frozen=True)
class PromptEnd:
    """The logits after a whole prompt of `num_tokens` tokens: the same prompt gets its first token without a pass."""

    num_tokens: int
    logits: Logits


@dataclass(frozen=True)
class Part:
    """The first `num_tokens` tokens of a payload."""

    payload: Payload
    num_tokens: int
