"""Attention of one query per row on a CPU: the heads that share keys in one product, with either softmax.

The arguments are those of `device.decode_attention`.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_mcp.mlx_backend.cpu.exp2 import BASE_2
from mlx_mcp.mlx_backend.softmax import MLX

# The scores that are computed at a time. A dozen tensors of this size fit into a CPU's caches, and into the 32 MB of
# freed memory that MLX keeps on CPUs; memory that the system maps anew takes four times as long as to compute it.
MAX_SCORES = 1 << 18


def folded_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """Attention by MLX's softmax, which is bitwise what MLX's own attention is on its wheel's BLAS.

    MLX's own reads the keys once for each query head; to fold the heads that share keys into one product is 1.3 to 1.5
    times as fast (docs/log.md).
    """
    rows, heads, _, width = queries.shape
    kv_heads = keys.shape[1]
    scores = (queries * scale).reshape(rows, kv_heads, heads // kv_heads, width) @ keys.swapaxes(-1, -2)
    (weights,), _ = MLX.weigh([scores], [mask], None)
    return (weights @ values).reshape(rows, heads, 1, values.shape[-1])


def exp2_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None, sinks: mx.array | None
) -> mx.array:
    """Attention by the softmax to the base of 2, of a few rows at a time, one after another."""
    rows, heads, _, width = queries.shape
    kv_heads, tokens = keys.shape[1:3]
    if rows > max(1, MAX_SCORES // (heads * tokens)):
        outs: list[mx.array] = []
        for half in (slice(rows // 2), slice(rows // 2, rows)):
            (q,) = mx.depends([queries[half]], outs) if outs else [queries[half]]
            half_mask = None if mask is None else mask[half]
            outs.append(exp2_attention(q, keys[half], values[half], scale, half_mask, sinks))
        return mx.concatenate(outs)
    q = (queries * (scale * BASE_2.factor)).reshape(rows, kv_heads, heads // kv_heads, width)
    # Keys times queries: for queries times keys OpenBLAS would make a transposed copy of all keys.
    scores = mx.contiguous((keys @ q.swapaxes(-1, -2)).swapaxes(-1, -2))
    (weights,), total = BASE_2.weigh([scores], [mask], sinks)
    return (weights @ values / total).reshape(rows, heads, 1, values.shape[-1])
