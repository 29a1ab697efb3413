"""Attention of whole chunks on a CPU, computed by numpy in one small buffer of its own.

Where OpenBLAS is in front, attention is most of what is not a matrix product: mlx maps new memory for the scores of
each layer and takes exp of one number at a time, numpy takes many and works in place. Figures are in docs/log.md. Not
for decoding: it waits for each layer, where a step is run ahead of the tokens of the one before. Engine thread only.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import mlx.core as mx
import numpy as np

SCORES = 1 << 19  # in the buffer, 2 MB: it stays in a CPU's caches
FEWEST = 64  # queries at a time, if there are as many: products of a few rows are slow
BAR = 1e30  # taken off scores that are to get no weight

Pair = tuple[mx.array, mx.array]  # keys and values

buffer = np.empty(SCORES, np.float32)


def chunk_attention(
    queries: mx.array, prefix: Pair | None, own: Pair, mask: mx.array | None, scale: float, sinks: mx.array | None
) -> mx.array:
    """Attention of a chunk of each row over a prefix that all rows share, and over what each has for itself.

    queries: [rows, heads, chunk, head_dim], float32; prefix: [1, kv_heads, tokens, width] each; own: [rows, kv_heads,
    tokens, width] each; mask: bool [rows or 1, chunk, n] for the last n tokens; sinks [heads]: one more score for each
    query, which takes weight and has no value. Result: [rows, heads, chunk, width], which is there. A query with a NaN
    or an infinity among its scores gets NaN, and no other does.
    """
    rows, heads, chunk, width = queries.shape
    kv_heads, each = own[0].shape[1], heads // own[0].shape[1]
    queries = queries * scale
    mx.eval(queries, prefix or [], own, [] if mask is None else mask, [] if sinks is None else sinks)
    q = np.asarray(queries).reshape(rows, kv_heads, each, chunk, width)
    (own_keys, own_values), (keys, values) = (
        [np.asarray(x) for x in pair] for pair in (own, prefix or [x[:1, :, :0] for x in own])
    )
    bars = None if mask is None else np.where(np.asarray(mask), np.float32(0), np.float32(-BAR))
    sink = None if sinks is None else np.asarray(sinks).reshape(kv_heads, 1, each, 1, 1)
    shared = keys.shape[2]
    tokens = shared + own_keys.shape[2]
    out = np.empty((rows, kv_heads, each, chunk, own_values.shape[-1]), np.float32)
    with np.errstate(all="ignore"):  # a row of no numbers is found by its logits
        for some, of, part in pieces(rows, kv_heads, chunk, each, tokens):
            piece = np.ascontiguousarray(q[some, of, :, part].swapaxes(0, 1))
            num_heads, n, _, size, _ = piece.shape
            by_row = scratch(piece.size // width * tokens).reshape(num_heads, n, each * size, tokens)
            flat, scores = by_row.reshape(num_heads, -1, tokens), by_row.reshape(num_heads, n, each, size, tokens)
            if shared:
                np.matmul(piece.reshape(num_heads, -1, width), keys[0, of].swapaxes(1, 2), out=flat[..., :shared])
            heads_own = own_keys[some, of].transpose(1, 0, 3, 2)
            np.matmul(piece.reshape(num_heads, n, -1, width), heads_own, out=by_row[..., shared:])
            if bars is not None:
                barred = bars[some if len(bars) > 1 else slice(None), None, part]
                scores[..., tokens - bars.shape[-1] :] += barred
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
    return mx.array(out.reshape(rows, heads, chunk, -1))


def pieces(rows: int, kv_heads: int, chunk: int, each: int, tokens: int) -> list[tuple[slice, slice, slice]]:
    """Which rows, heads and queries go at a time: as many scores as the buffer has, if that is not too few queries."""
    at_once = max(1, max(FEWEST, SCORES // tokens) // each)  # queries of one head
    size = ceil(chunk / ceil(chunk / at_once))
    num_rows = max(1, min(rows, at_once // size))
    num_heads = max(1, at_once // (size * num_rows))  # together, since each has a dozen calls
    return [
        (slice(row, row + num_rows), slice(head, head + num_heads), slice(at, at + size))
        for head in range(0, kv_heads, num_heads)
        for row in range(0, rows, num_rows)
        for at in range(0, chunk, size)
    ]


def scratch(size: int) -> Any:
    """So many numbers of memory, whatever is in them; what was handed out before is not to be used any more."""
    return buffer[:size] if size <= len(buffer) else np.empty(size, np.float32)
