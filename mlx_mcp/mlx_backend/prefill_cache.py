"""The cache of a FULL layer while chunks of prompts are computed: of one row, or of several rows in one pass."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from mlx_mcp.core.slots import SharedPrefix, Slot
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.cpu.chunk_attention import Pair, chunk_attention, row_attention
from mlx_mcp.mlx_backend.device import keeps_scores, uses_cpu_attention
from mlx_mcp.mlx_backend.hook import AttendingCache, Handle, mlx_lm_attention
from mlx_mcp.mlx_backend.slabs import FullLayer, num_shared

async_eval: Any = mx.async_eval  # which has no types


class PrefillCache(AttendingCache):
    """One row of a FULL layer while a chunk of its prompt is computed."""

    def __init__(self, layer: FullLayer, slot: Slot, length: int, prefix: SharedPrefix | None = None) -> None:
        assert length >= num_shared(prefix), f"{length} tokens of a row whose prefix has {num_shared(prefix)}"
        self.layer, self.slot, self.offset, self.prefix = layer, slot, length, prefix
        if layer.kv_bits is not None:  # mlx-lm's attention looks for these attributes
            self.bits, self.group_size = layer.kv_bits.bits, layer.kv_bits.group_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Append keys and values [1, kv_heads, tokens, head_dim]."""
        self.append(keys, values)
        self.fetch()
        return self.keys_and_values()

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Write keys and values after those in the slot."""
        start = self.offset - num_shared(self.prefix)
        self.layer.write(self.slot, start, self.layer.encode(keys), self.layer.encode(values))
        self.offset += keys.shape[2]
        self.dtype = values.dtype

    def fetch(self) -> None:
        """Take the tokens of the row for `attend`; until it is computed, nothing may be written to the slab."""
        end, i = self.offset - num_shared(self.prefix), self.slot.index
        slab = self.layer.slabs[self.slot.slab.slab_id]
        whole: list[Any] = [tuple(plane[i : i + 1, :, :end] for plane in planes) for planes in slab]
        self.own: Pair = (whole[0][0], whole[1][0])
        self.shared: Pair | None = None
        if self.prefix is not None:  # where mlx-lm's attention reads the prefix, a copy of it, until this layer is done
            first = self.layer.prefixes[self.prefix.prefix_id]
            self.shared = first[0][0], first[1][0]
            both = zip(first, whole, strict=True)
            whole = [tuple(mx.concatenate(list(p), axis=2) for p in zip(*planes, strict=True)) for planes in both]
        self.keys, self.values = whole if self.layer.kv_bits else [planes[0] for planes in whole]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask that mlx-lm's caches make; the argument's name is theirs."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """See AttendingCache.attend."""
        simple = mask is None or isinstance(mask, str) or (mask.ndim == 2 and mask.dtype == mx.bool_)
        if simple and self.uses_cpu_attention(queries):
            return row_attention(queries, self.shared, self.own, mask, scale, sinks)
        num_queries, most = queries.shape[2], self.queries_at_once(queries)
        outs: list[mx.array] = []
        for start in range(0, num_queries, most):
            end = min(start + most, num_queries)
            seen = self.offset - (num_queries - end)  # later tokens are after the last of these queries
            part = mask[..., start:end, :seen] if isinstance(mask, mx.array) else mask
            # A slice, since mlx-lm's quantized attention changes its queries, and a layer may attend twice with them.
            q, keys, values = queries[:, :, start:end], first(self.keys, seen), first(self.values, seen)
            if outs:  # otherwise MLX computes the scores of all parts first, and then goes on with them
                q = mx.depends(q, outs[-1])
            outs.append(mlx_lm_attention(q, keys, values, self, scale, part, sinks))
        out = outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)
        if device.on_cpu():
            async_eval(out)  # while this thread still builds the layers after it
        return out

    def queries_at_once(self, queries: mx.array) -> int:
        """How many of a chunk's queries are attended to at once: all, unless their scores would take too much."""
        _, heads, num_queries, _ = queries.shape
        if not self.keeps_scores(queries):
            return num_queries
        return min(num_queries, max(1, device.MAX_SCORES // (heads * self.offset)))

    def keeps_scores(self, queries: mx.array) -> bool:
        """Whether the scores of these queries lie in memory."""
        return keeps_scores(queries.shape[-1], self.layer.kv_bits is not None)

    def uses_cpu_attention(self, queries: mx.array) -> bool:
        """Whether the attention of a chunk's queries, or of as many, is computed by `cpu/`."""
        num_scores = queries.shape[1] * queries.shape[2] * self.offset
        return self.layer.kv_bits is None and uses_cpu_attention(num_scores, queries.dtype)


def first(planes: Any, num_tokens: int) -> Any:
    """The first tokens of keys or values: of an array, or of the planes of a quantized one."""
    if isinstance(planes, mx.array):
        return planes[:, :, :num_tokens]
    return tuple(plane[:, :, :num_tokens] for plane in planes)


class PrefillBatchCache(AttendingCache):
    """Chunks of several rows in one FULL layer, padded at their ends to the longest of them.

    The linear layers run over all of them, and read the model's weights once; each row attends to its own tokens.
    """

    def __init__(self, rows: list[PrefillCache], sizes: list[int]) -> None:
        self.rows, self.sizes = rows, sizes
        self.offset = mx.array([row.offset for row in rows])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Append keys and values [rows, kv_heads, longest, head_dim], of each row as many as its chunk has."""
        for i, (row, size) in enumerate(zip(self.rows, self.sizes, strict=True)):
            row.append(keys[i : i + 1, :, :size], values[i : i + 1, :, :size])
        self.dtype = values.dtype
        return self.keys_and_values()

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The rows' masks, which the model passes on to `attend`."""
        assert max(self.sizes) == N, f"chunks of {self.sizes} tokens in a pass of {N}"
        return [row.make_mask(size, return_array, window_size) for row, size in zip(self.rows, self.sizes, strict=True)]

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """See AttendingCache.attend."""
        assert isinstance(mask, list), "the model made a mask of its own"
        first = self.rows[0]
        causal = sinks is None and all(of_row is None or isinstance(of_row, str) for of_row in mask)
        neighbours = {(row.prefix, row.slot.slab) for row in self.rows} == {(first.prefix, first.slot.slab)}
        if causal and neighbours and first.prefix is not None and first.uses_cpu_attention(queries):
            return self._attend_at_once(first.prefix, queries, scale)
        for row in self.rows:  # once all is written: otherwise each row of a slab would have the slab copied
            row.fetch()
        longest, outs = queries.shape[2], list[mx.array]()
        for i, (row, size, of_row) in enumerate(zip(self.rows, self.sizes, mask, strict=True)):
            q = queries[i : i + 1, :, :size]
            if outs and row.keeps_scores(q):  # one row's at a time
                q = mx.depends(q, outs[-1])
            out = row.attend(q, scale, of_row, sinks)
            outs.append(out if size == longest else mx.pad(out, [(0, 0), (0, 0), (0, longest - size), (0, 0)]))
        return mx.concatenate(outs)

    def _attend_at_once(self, prefix: SharedPrefix, queries: mx.array, scale: float) -> mx.array:
        """Attention of all rows, which are in one slab, over their prefix, and of each over its slot, by `cpu/`."""
        layer = self.rows[0].layer
        ends = [row.offset - prefix.num_tokens for row in self.rows]
        starts = mx.array(ends) - mx.array(self.sizes)
        order = mx.arange(max(ends)) - mx.arange(queries.shape[2])[:, None]
        slots, longest = [row.slot.index for row in self.rows], max(ends)
        keys, values = (
            mx.concatenate([planes[0][i : i + 1, :, :longest] for i in slots])
            for planes in layer.slabs[self.rows[0].slot.slab.slab_id]
        )
        first = layer.prefixes[prefix.prefix_id]
        mask = order <= starts[:, None, None]
        return chunk_attention(queries, (first[0][0], first[1][0]), (keys, values), mask, scale, None)
