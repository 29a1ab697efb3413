"""The cache of a WINDOW layer while rows decode: layers that attend to the last tokens alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_mcp.mlx_backend.device import decode_attention
from mlx_mcp.mlx_backend.hook import AttendingCache, Handle


class WindowCache(AttendingCache):
    """The rows of a batch in one WINDOW layer, one token each; every row has a ring buffer of its own."""

    def __init__(self, rings: list[Any]) -> None:  # RotatingKVCache, which has no types
        self.rings = rings
        self.offset = mx.array([ring.offset for ring in rings])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Append keys and values [rows, kv_heads, 1, head_dim]."""
        self.whole = [ring.update_and_fetch(keys[i : i + 1], values[i : i + 1]) for i, ring in enumerate(self.rings)]
        self.dtype = values.dtype
        return self.keys_and_values()

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> None:
        """None: a ring holds no more than its window."""
        assert N == 1, f"{N} tokens in a step of one token each"
        assert window_size is None or window_size >= self.rings[0].max_size, "a window smaller than its ring"

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """See AttendingCache.attend."""
        assert mask is None, "the model made a mask of its own"
        outs = [
            decode_attention(queries[i : i + 1], keys, values, scale, None, sinks)
            for i, (keys, values) in enumerate(self.whole)
        ]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)
