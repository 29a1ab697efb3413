"""Attention of whole chunks on a CPU, computed by numpy in tiles, on as many threads as OpenBLAS has.

Where MLX uses OpenBLAS, attention is most of what is not a matrix product: MLX maps new memory for the scores of each
layer and computes exp of one number at a time; numpy computes many at a time, in place, in one small buffer for each
thread. Figures are in docs/log.md. It is not for decoding: it waits for each layer, whereas a step of decoding may be
started before the tokens of the step before it are known. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_mcp.mlx_backend.cpu.decode_attention import exp2_attention
from mlx_mcp.mlx_backend.cpu.exp2 import MASK_PENALTY
from mlx_mcp.mlx_backend.cpu.openblas import num_threads

async_eval: Any = mx.async_eval  # which has no types
BUFFER_SCORES = 1 << 19  # in a thread's buffer, 2 MB: it stays in a CPU's caches
MIN_THREAD_SCORES = 1 << 16  # scores that are worth a thread of their own
MIN_QUERIES = 64  # in a tile, if there are as many: products of a few rows are slow

Pair = tuple[mx.array, mx.array]  # keys and values


def chunk_attention(
    queries: mx.array,
    prefix: Pair | None,
    own: Pair,
    mask: mx.array | Literal["causal"] | None,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of a chunk of each row over a prefix that all rows share, and over each row's own tokens.

    queries: [rows, heads, chunk, head_dim], float32; prefix: [1, kv_heads, tokens, width] each; own: [rows, kv_heads,
    tokens, width] each; mask: bool [rows or 1, chunk, n] for the last n tokens, or "causal" where the chunk's own
    tokens are the last; sinks [heads]: one more score for each query, which takes weight and has no value. Returns
    [rows, heads, chunk, width], evaluated. A query with a NaN or an infinity among its scores gets NaN, and no other
    does.
    """
    rows, heads, chunk, width = queries.shape
    kv_heads, each = own[0].shape[1], heads // own[0].shape[1]
    queries = queries * scale
    given: Any = mask if isinstance(mask, mx.array) else []
    mx.eval(queries, prefix or [], own, given, [] if sinks is None else sinks)
    own_keys, own_values = (np.asarray(x) for x in own)
    keys, values = (np.asarray(x) for x in prefix) if prefix else (own_keys[:1, :, :0], own_values[:1, :, :0])
    operands = Operands(
        np.asarray(queries).reshape(rows, kv_heads, each, chunk, width),
        keys,
        values,
        own_keys,
        own_values,
        None if mask is None else causal_penalties(chunk) if isinstance(mask, str) else penalties(np.asarray(mask)),
        None if sinks is None else np.asarray(sinks).reshape(kv_heads, 1, each, 1, 1),
        np.empty((rows, kv_heads, each, chunk, own_values.shape[-1]), np.float32),
    )
    threads = max(1, min(num_threads(), rows * heads * chunk * operands.tokens // MIN_THREAD_SCORES))
    todo = tiles(rows, kv_heads, chunk, each, operands.tokens, threads)

    def work(thread: int) -> None:
        """Compute a thread's share of the tiles."""
        for tile in todo[thread::threads]:
            operands.attend(tile, thread)

    run_on_threads(threads, work)
    return mx.array(operands.out.reshape(rows, heads, chunk, -1))


def row_attention(
    queries: mx.array, prefix: Pair | None, own: Pair, mask: Any, scale: float, sinks: mx.array | None
) -> mx.array:
    """Attention of one row's chunk, with the arguments of `chunk_attention`; a mask is [chunk, n].

    One query without a prefix or a mask, as of a prompt's last token, is not waited for: it is left to MLX.
    """
    if queries.shape[2] == 1 and prefix is None and mask is None:
        out = exp2_attention(queries, *own, scale, None, sinks)
        async_eval(out)
        return out
    assert not isinstance(mask, str) or mask == "causal", f"a mask of {mask}"
    return chunk_attention(queries, prefix, own, mask[None] if isinstance(mask, mx.array) else mask, scale, sinks)


Tile = tuple[slice, slice, slice]  # rows, heads with keys of their own, queries


@dataclass(frozen=True, eq=False)
class Operands:
    """The arrays of one call, and where its result goes; threads fill tiles of `out`."""

    queries: Any  # [rows, kv_heads, heads per kv_head, chunk, width], times the scale
    prefix_keys: Any  # [1, kv_heads, tokens, width]; no tokens where there is no prefix
    prefix_values: Any
    own_keys: Any  # [rows, kv_heads, tokens, width]
    own_values: Any
    penalties: Any  # [rows or 1, chunk, n], added to the last n scores; None where nothing is masked
    sinks: Any  # [kv_heads, 1, heads per kv_head, 1, 1] or None
    out: Any  # [rows, kv_heads, heads per kv_head, chunk, width]

    @property
    def tokens(self) -> int:
        """The tokens that a query may attend to: those of the prefix, and those of its own row."""
        return int(self.prefix_keys.shape[2] + self.own_keys.shape[2])

    @np.errstate(all="ignore")  # a row of no numbers is found by its logits
    def attend(self, tile: Tile, thread: int) -> None:
        """Compute the attention of a tile, in the thread's buffer."""
        rows, heads, part = tile
        queries = np.ascontiguousarray(self.queries[rows, heads, :, part].swapaxes(0, 1))
        num_heads, n, each, size, width = queries.shape
        shared, tokens = self.prefix_keys.shape[2], self.tokens
        by_row = scratch(thread, queries.size // width * tokens).reshape(num_heads, n, each * size, tokens)
        flat, scores = by_row.reshape(num_heads, -1, tokens), by_row.reshape(num_heads, n, each, size, tokens)
        if shared:
            prefix_keys = self.prefix_keys[0, heads].swapaxes(1, 2)
            np.matmul(queries.reshape(num_heads, -1, width), prefix_keys, out=flat[..., :shared])
        own_keys = self.own_keys[rows, heads].transpose(1, 0, 3, 2)
        np.matmul(queries.reshape(num_heads, n, -1, width), own_keys, out=by_row[..., shared:])
        if self.penalties is not None:
            of_rows = self.penalties[rows if len(self.penalties) > 1 else slice(None), None, part]
            scores[..., tokens - of_rows.shape[-1] :] += of_rows
        total = exponentiate(scores, None if self.sinks is None else self.sinks[heads])
        weighed = by_row[..., shared:] @ self.own_values[rows, heads].swapaxes(0, 1)
        if shared:
            weighed += (flat[..., :shared] @ self.prefix_values[0, heads]).reshape(weighed.shape)
        self.out[rows, heads, :, part] = (weighed.reshape(num_heads, n, each, size, -1) / total).swapaxes(0, 1)


def exponentiate(scores: Any, sinks: Any) -> Any:
    """Replace scores by exp(score - maximum); returns the sums over the last axis, sinks included."""
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks)
    scores -= top
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks - top)
    return total


def tiles(rows: int, kv_heads: int, chunk: int, each: int, tokens: int, threads: int) -> list[Tile]:
    """The tiles of a call: as many scores in each as a buffer has, unless these would be too few queries."""
    most = ceil(rows * kv_heads * chunk / threads)
    at_once = max(1, min(most, max(MIN_QUERIES, BUFFER_SCORES // tokens) // each))  # queries of one head
    size = ceil(chunk / ceil(chunk / at_once))
    num_rows = max(1, min(rows, at_once // size))
    num_heads = max(1, at_once // (size * num_rows))  # together, since each tile takes a dozen calls
    return [
        (slice(row, row + num_rows), slice(head, head + num_heads), slice(at, at + size))
        for head in range(0, kv_heads, num_heads)
        for row in range(0, rows, num_rows)
        for at in range(0, chunk, size)
    ]


def penalties(mask: Any) -> Any:
    """What to add to scores for a bool mask."""
    return np.where(mask, np.float32(0), np.float32(-MASK_PENALTY))


def causal_penalties(chunk: int) -> Any:
    """What to add to the scores [1, chunk, chunk] of tokens that attend to themselves and to those before them."""
    return triangle(1 << (chunk - 1).bit_length())[None, :chunk, :chunk]


@cache
def triangle(size: int) -> Any:
    """The penalties [size, size] of such tokens; for few sizes, since all of them are kept."""
    return penalties(np.tri(size, dtype=np.bool_))


def run_on_threads(threads: int, work: Callable[[int], None]) -> None:
    """Call work(0) to work(threads - 1), the first on this thread; all have ended once it returns or raises."""
    others = [pool().submit(work, thread) for thread in range(1, threads)]
    try:
        work(0)
    finally:
        wait(others)
    for other in others:
        other.result()


@cache
def pool() -> ThreadPoolExecutor:
    """The other threads; numpy releases the interpreter's lock in everything that takes long."""
    return ThreadPoolExecutor(num_threads(), "attention")


def scratch(thread: int, size: int) -> Any:
    """Memory for `size` numbers of a thread, which must no longer use what it was given before."""
    return buffer(thread, BUFFER_SCORES)[:size] if size <= BUFFER_SCORES else np.empty(size, np.float32)


@cache
def buffer(thread: int, size: int) -> Any:
    """A thread's buffer."""
    return np.empty(size, np.float32)
