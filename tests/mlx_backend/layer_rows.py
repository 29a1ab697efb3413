"""Random rows of one layer, for the tests of its caches; and attention as it is where MLX uses OpenBLAS on a CPU."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mcp.core.slots import SharedPrefix, Slab, Slot
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.cpu import chunk_attention
from mlx_mcp.mlx_backend.decode_cache import DecodeCache
from mlx_mcp.mlx_backend.placement import place
from mlx_mcp.mlx_backend.slabs import FullLayer, KvBits, num_shared

FIRST, SECOND = Slab(0, 256, 8), Slab(1, 256, 8)
LONG, SHORT = SharedPrefix(5, 70), SharedPrefix(2, 33)
Row = tuple[Slot, SharedPrefix | None, int]  # the last: tokens after the prefix, this step's included
# In order of slab and slot, with gaps.
ROWS: list[Row] = [
    (Slot(FIRST, 0), LONG, 6),
    (Slot(FIRST, 1), LONG, 6),
    (Slot(FIRST, 2), SHORT, 40),
    (Slot(FIRST, 3), None, 90),
    (Slot(FIRST, 5), LONG, 1),
    (Slot(FIRST, 6), LONG, 77),
    (Slot(SECOND, 1), None, 3),
    (Slot(SECOND, 2), None, 50),
    (Slot(SECOND, 4), SHORT, 2),
    (Slot(SECOND, 7), LONG, 20),
]

# Scale and bound. The larger scale gives almost all weight to one token, by scores of about 80, themselves rounded.
SCALES = ((0.125, 2e-6), (3.0, 5e-5))


class Rows:
    """Random rows of one layer, with their prefixes shared and laid out whole."""

    def __init__(
        self,
        rows: Sequence[Row] = ROWS,
        heads: int = 4,
        kv_heads: int = 2,
        key_width: int = 64,
        value_width: int = 64,
        kv_bits: int | None = None,
    ) -> None:
        mx.random.seed(0)
        stored = KvBits(kv_bits, 32) if kv_bits else None
        self.rows, self.shared, self.whole = rows, FullLayer(stored), FullLayer(stored)
        self.queries = mx.random.normal((len(rows), heads, 1, key_width))
        self.scale = key_width**-0.5

        def tokens(num_tokens: int) -> list[mx.array]:
            return [mx.random.normal((1, kv_heads, num_tokens, width)) for width in (key_width, value_width)]

        first = {prefix: tokens(num_shared(prefix)) for _, prefix, _ in rows}
        for prefix, pair in first.items():
            if prefix is not None:
                keys, values = (list(self.shared.encode(x)) for x in pair)
                self.shared.prefixes[prefix.prefix_id] = keys, values
        self.tokens: list[list[mx.array]] = []  # each row's: keys and values [1, kv_heads, tokens, width]
        for _, prefix, num_tokens in rows:
            pairs = zip(first[prefix], tokens(num_tokens), strict=True)
            self.tokens.append([mx.concatenate([*both], axis=2) for both in pairs])

    def decode(
        self, layer: FullLayer, window: int | None = None, sinks: mx.array | None = None, shared: bool = False
    ) -> Any:
        """Attention of one more token per row: its last, the others being there."""
        where = []
        for (slot, prefix, _), (keys, values) in zip(self.rows, self.tokens, strict=True):
            prefix, last = prefix if shared else None, keys.shape[2] - 1
            if last > num_shared(prefix):
                layer.write(slot, 0, *(layer.encode(x[:, :, num_shared(prefix) : last]) for x in (keys, values)))
            where.append((slot, last, prefix))
        cache = DecodeCache(layer, place(where))
        new = [mx.concatenate([row[i][:, :, -1:] for row in self.tokens]) for i in (0, 1)]
        handle, _ = cache.update_and_fetch(*new)
        return np.array(handle.cache.attend(self.queries, self.scale, window, sinks))

    def both(self, window: int | None = None, sinks: mx.array | None = None) -> tuple[Any, Any]:
        """What comes out with shared prefixes, and what with every row whole."""
        return self.decode(self.shared, window, sinks, shared=True), self.decode(self.whole, window, sinks)


def use_cpu_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have attention of however few scores computed as where MLX uses OpenBLAS."""
    monkeypatch.setattr(device, "MIN_SCORES", 0)
    monkeypatch.setattr(device, "uses_openblas", lambda: True)


def in_pieces(monkeypatch: pytest.MonkeyPatch, num_scores: int) -> None:
    """Have a chunk's attention take so many scores at a time, however few queries that is."""
    monkeypatch.setattr(chunk_attention, "BUFFER_SCORES", num_scores)
    monkeypatch.setattr(chunk_attention, "MIN_QUERIES", 1)
