"""Holds the keys and values of a model's live rows, and gives them to the model as the caches that it expects.

What all rows have in common, and rows that go through the model one by one. Engine thread only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_mcp.core.slots import KvCost
from mlx_mcp.core.steps import Admission, Chunk, Move, Restore
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.cache_tree import leaves
from mlx_mcp.mlx_backend.layers import Codec, KvPayload, put, read

async_eval: Any = mx.async_eval  # which has no types
SPAN_TOKENS = 1024  # are concatenated at a time
SPANS_UNDER_WAY = 4  # on a GPU: a restore takes as much memory besides its row; on a CPU a single span

Batch = tuple[list[int], list[Any]]  # rows by sequence id that go through the model together, and the caches to go with


class Rows(ABC):
    """The live rows of one model, in one of three ways; see `make_rows`."""

    def __init__(self, model: Any, cost: KvCost, codec: Codec) -> None:
        self.model, self.cost, self.codec = model, cost, codec
        self.lengths: dict[int, int] = {}  # sequence id → tokens computed, or being computed
        self.own: dict[int, list[Any]] = {}  # sequence id → caches of that row alone

    @property
    def nbytes(self) -> int:
        """The bytes of all rows now."""
        return sum(cache.nbytes for caches in self.own.values() for cache in caches if cache is not None)

    def passes(self, chunks: tuple[Chunk, ...]) -> list[list[Chunk]]:
        """The passes of a step's chunks through the model, one after another: the chunks of a pass go together."""
        return [[chunk] for chunk in chunks]

    def together(self, chunks: list[Chunk]) -> list[Any]:
        """The caches to compute a pass with, in which every chunk has a row."""
        (chunk,) = chunks
        return self.caches_of(chunk)

    def caches_of(self, chunk: Chunk) -> list[Any]:
        """The caches to compute a chunk with; makes the row, unless it exists already."""
        sequence_id = chunk.sequence_id
        if sequence_id not in self.lengths:
            self.begin(sequence_id)
        assert self.lengths[sequence_id] == chunk.start, f"a gap or an overlap in row {sequence_id}"
        self.lengths[sequence_id] = chunk.end
        return self.own[sequence_id]

    def admit(self, admission: Admission) -> None:  # noqa: B027  # not all rows have slots
        """Note where a row will be; it is made with its first tokens."""

    def begin(self, sequence_id: int, num_tokens: int = 0) -> None:
        """Make a row of no tokens, into which `num_tokens` will be written at once."""
        self.lengths[sequence_id] = 0
        self.own[sequence_id] = make_prompt_cache(self.model)

    def restore(self, restore: Restore) -> None:
        """Make a row from payloads. On a GPU it only waits where a row is so long that the copies take much memory."""
        sequence_id, num_tokens = restore.sequence_id, restore.num_tokens
        self.begin(sequence_id, num_tokens)
        self._fill(restore)
        own = leaves(self.own[sequence_id])
        for i, planes in self.codec.latest(restore.parts, num_tokens).items():
            put(own[i], planes, num_tokens)
        self.lengths[sequence_id] = num_tokens
        settle(self.arrays([sequence_id]))

    def cut(self, sequence_id: int, start: int, end: int, state: bool) -> KvPayload:
        """Copy tokens [start, end) out of a row, with its states if `state` is set; `end` is then the row's end."""
        length = self.lengths[sequence_id]
        assert start < end <= length, f"tokens [{start}, {end}) of {length}"
        assert end == length or not state, f"states at {end} of a row of {length} tokens"
        payload = self.codec.cut(lambda i: self._read(sequence_id, i, start, end), start, end, state)
        async_eval(payload.arrays)  # at once: until it is done, what it reads cannot be written in place
        return payload

    @abstractmethod
    def batches(self, sequence_ids: list[int]) -> list[Batch]:
        """The rows, ordered and grouped as they go through the model with one more token each."""

    def arrays(self, sequence_ids: list[int]) -> list[Any]:
        """The arrays that must be evaluated for these rows after a forward pass."""
        own = (self.own.get(sequence_id, []) for sequence_id in sequence_ids)
        return [cache.state for caches in own for cache in caches if cache is not None]

    def _fill(self, restore: Restore) -> None:
        """Write a restored row's tokens to its FULL layers."""
        own = leaves(self.own[restore.sequence_id])
        for number, (start, end) in enumerate(spans(0, restore.num_tokens), 1):
            for i, planes in self.codec.tokens(restore.parts, start, end).items():
                own[i].update_and_fetch(*planes)
            settle(self.arrays([restore.sequence_id]), number)

    def _read(self, sequence_id: int, i: int, start: int, end: int) -> list[mx.array]:
        """See layers.read; of the row's i-th layer."""
        return read(self._leaf(sequence_id, i), start, end)

    def _leaf(self, sequence_id: int, i: int) -> Any:
        """The row's i-th layer as a cache of that row alone."""
        return leaves(self.own[sequence_id])[i]

    def move(self, move: Move) -> None:  # noqa: B027  # not all rows have slots
        """Move a row to a larger slot; nothing is done where rows have none."""

    def release(self, sequence_id: int) -> bool:
        """Forget a row; returns whether there was one."""
        self.own.pop(sequence_id, None)
        return self.lengths.pop(sequence_id, None) is not None


class SoloRows(Rows):
    """Each row by itself."""

    def batches(self, sequence_ids: list[int]) -> list[Batch]:
        """One batch for each row."""
        for sequence_id in sequence_ids:
            self.lengths[sequence_id] += 1
        return [([sequence_id], self.own[sequence_id]) for sequence_id in sequence_ids]


def settle(arrays: list[Any], number: int = 0) -> None:
    """Have arrays computed that are written to in spans, of which this is the `number`-th.

    On a CPU it waits for them: a computation that waits for the copies would keep MLX from the row's memory. On a GPU
    the copies are in order with all else, and only a long row waits, now and then, for the memory that they take.
    """
    if device.on_cpu() or (number and number % SPANS_UNDER_WAY == 0):
        mx.eval(arrays)
    else:
        async_eval(arrays)


def spans(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The tokens [start, end) in spans that are concatenated one after another."""
    return ((at, min(at + SPAN_TOKENS, end)) for at in range(start, end, SPAN_TOKENS))
