"""Attention of whole chunks on a CPU, computed by numpy, in a small buffer for each of as many threads as OpenBLAS has.

Where OpenBLAS is in front, attention is most of what is not a matrix product: mlx maps new memory for the scores of
each layer and takes exp of one number at a time, numpy takes many and works in place. Figures are in docs/log.md. Not
for decoding: it waits for each layer, where a step is run ahead of the tokens of the one before. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from math import ceil
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_mcp.mlx_backend.blas import num_threads

SCORES = 1 << 19  # in a thread's buffer, 2 MB: it stays in a CPU's caches
WORTH = 1 << 16  # scores that are worth a thread of their own
FEWEST = 64  # queries at a time, if there are as many: products of a few rows are slow
BAR = 1e30  # taken off scores that are to get no weight

Pair = tuple[mx.array, mx.array]  # keys and values


def chunk_attention(
    queries: mx.array,
    prefix: Pair | None,
    own: Pair,
    mask: mx.array | Literal["causal"] | None,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of a chunk of each row over a prefix that all rows share, and over what each has for itself.

    queries: [rows, heads, chunk, head_dim], float32; prefix: [1, kv_heads, tokens, width] each; own: [rows, kv_heads,
    tokens, width] each; mask: bool [rows or 1, chunk, n] for the last n tokens, or the chunk's own are the last, in
    order; sinks [heads]: one more score for each query, which takes weight and has no value. Result: [rows, heads,
    chunk, width], which is there. A query with a NaN or an infinity among its scores gets NaN, and no other does.
    """
    rows, heads, chunk, width = queries.shape
    kv_heads, each = own[0].shape[1], heads // own[0].shape[1]
    queries = queries * scale
    given: Any = mask if isinstance(mask, mx.array) else []
    mx.eval(queries, prefix or [], own, given, [] if sinks is None else sinks)
    q = np.asarray(queries).reshape(rows, kv_heads, each, chunk, width)
    own_keys, own_values = (np.asarray(x) for x in own)
    keys, values = (np.asarray(x) for x in prefix) if prefix else (own_keys[:1, :, :0], own_values[:1, :, :0])
    bars = None if mask is None else in_order(chunk) if isinstance(mask, str) else barred(np.asarray(mask))
    sink = None if sinks is None else np.asarray(sinks).reshape(kv_heads, 1, each, 1, 1)
    shared = keys.shape[2]
    tokens = shared + own_keys.shape[2]
    out = np.empty((rows, kv_heads, each, chunk, own_values.shape[-1]), np.float32)
    threads = max(1, min(num_threads(), rows * heads * chunk * tokens // WORTH))
    todo = pieces(rows, kv_heads, chunk, each, tokens, threads)

    @np.errstate(all="ignore")  # a row of no numbers is found by its logits
    def attend(thread: int) -> None:
        """Compute a thread's share of the pieces."""
        for some, of, part in todo[thread::threads]:
            piece = np.ascontiguousarray(q[some, of, :, part].swapaxes(0, 1))
            num_heads, n, _, size, _ = piece.shape
            by_row = scratch(thread, piece.size // width * tokens).reshape(num_heads, n, each * size, tokens)
            flat, scores = by_row.reshape(num_heads, -1, tokens), by_row.reshape(num_heads, n, each, size, tokens)
            if shared:
                np.matmul(piece.reshape(num_heads, -1, width), keys[0, of].swapaxes(1, 2), out=flat[..., :shared])
            heads_own = own_keys[some, of].transpose(1, 0, 3, 2)
            np.matmul(piece.reshape(num_heads, n, -1, width), heads_own, out=by_row[..., shared:])
            if bars is not None:
                scores[..., tokens - bars.shape[-1] :] += bars[some if len(bars) > 1 else slice(None), None, part]
            top = scores.max(axis=-1, keepdims=True)
            if sink is not None:
                top = np.maximum(top, sink[of])
            scores -= top
            np.exp(scores, out=scores)
            total = scores.sum(axis=-1, keepdims=True)
            if sink is not None:
                total += np.exp(sink[of] - top)
            weighed = by_row[..., shared:] @ own_values[some, of].swapaxes(0, 1)
            if shared:
                weighed += (flat[..., :shared] @ values[0, of]).reshape(weighed.shape)
            out[some, of, :, part] = (weighed.reshape(num_heads, n, each, size, -1) / total).swapaxes(0, 1)

    share(threads, attend)
    return mx.array(out.reshape(rows, heads, chunk, -1))


def pieces(
    rows: int, kv_heads: int, chunk: int, each: int, tokens: int, threads: int
) -> list[tuple[slice, slice, slice]]:
    """Which rows, heads and queries go at a time: as many scores as a buffer has, if that is not too few queries."""
    most = ceil(rows * kv_heads * chunk / threads)
    at_once = max(1, min(most, max(FEWEST, SCORES // tokens) // each))  # queries of one head
    size = ceil(chunk / ceil(chunk / at_once))
    num_rows = max(1, min(rows, at_once // size))
    num_heads = max(1, at_once // (size * num_rows))  # together, since each has a dozen calls
    return [
        (slice(row, row + num_rows), slice(head, head + num_heads), slice(at, at + size))
        for head in range(0, kv_heads, num_heads)
        for row in range(0, rows, num_rows)
        for at in range(0, chunk, size)
    ]


def barred(mask: Any) -> Any:
    """What to add to scores for a bool mask."""
    return np.where(mask, np.float32(0), np.float32(-BAR))


def in_order(chunk: int) -> Any:
    """What to add to the scores [1, chunk, chunk] of tokens that attend to those before them and to themselves."""
    return triangle(1 << (chunk - 1).bit_length())[None, :chunk, :chunk]


@cache
def triangle(size: int) -> Any:
    """The same for so many; of few sizes, since all are kept."""
    return barred(np.tri(size, dtype=np.bool_))


def share(threads: int, work: Callable[[int], None]) -> None:
    """Have work(0) to work(threads - 1) done, the first on this thread; all have ended once it returns or raises."""
    others = [pool().submit(work, thread) for thread in range(1, threads)]
    try:
        work(0)
    finally:
        wait(others)
    for other in others:
        other.result()


@cache
def pool() -> ThreadPoolExecutor:
    """The threads beside this one; numpy lets go of the interpreter in all that takes long."""
    return ThreadPoolExecutor(num_threads(), "attention")


def scratch(thread: int, size: int) -> Any:
    """So many numbers of a thread's memory; what it was handed before is not to be used any more."""
    return buffer(thread, SCORES)[:size] if size <= SCORES else np.empty(size, np.float32)


@cache
def buffer(thread: int, size: int) -> Any:
    """Memory for the scores of a thread."""
    return np.empty(size, np.float32)
