"""The cache of a FULL layer while rows decode: one attention call for each run of neighbouring slots.

The first tokens of rows that share a prefix are attended to by one product for all of these rows.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from mlx_mcp.core.slots import SharedPrefix
from mlx_mcp.mlx_backend.device import decode_attention, softmax_for
from mlx_mcp.mlx_backend.hook import AttendingCache, Handle
from mlx_mcp.mlx_backend.placement import Placement, Run
from mlx_mcp.mlx_backend.slabs import FullLayer

quantized_attention: Any = base.quantized_scaled_dot_product_attention
quantized_matmul: Any = mx.quantized_matmul  # whose types take no planes unpacked


class DecodeCache(AttendingCache):
    """The rows of a batch in one FULL layer, one token each."""

    def __init__(self, layer: FullLayer, placement: Placement) -> None:
        self.layer, self.placement, self.offset = layer, placement, placement.offsets

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Append keys and values [rows, kv_heads, 1, head_dim], each at its row's own position."""
        new = self.layer.encode(keys), self.layer.encode(values)
        heads = self.placement.all_heads(keys.shape[1])
        for run in self.placement.runs:
            slab = self.layer.planes(run.slab, new)
            for planes, tokens in zip(slab, new, strict=True):
                for plane, x in zip(planes, tokens, strict=True):
                    if run.mask is None:  # one position for all: no scatter
                        plane[run.where, :, run.longest - 1 : run.longest] = x[run.rows]
                    else:
                        plane[run.slots, heads, run.positions] = x[run.rows, :, 0]
        self.dtype = values.dtype
        return self.keys_and_values()

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> int | None:
        """The window, which the model passes on to `attend`; each run has its own mask."""
        assert N == 1, f"{N} tokens in a step of one token each"
        return window_size

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """See AttendingCache.attend."""
        assert mask is None or isinstance(mask, int), "the model made a mask of its own"
        outs: dict[int, mx.array] = {}  # by each run's first row
        for prefix, runs in self.placement.by_prefix.items():
            if prefix is None:
                some = [self._attend_alone(run, queries, scale, mask, sinks) for run in runs]
            else:
                some = self._attend_sharing(prefix, runs, queries, scale, mask, sinks)
            outs |= zip((run.rows.start for run in runs), some, strict=True)
        in_order = [outs[run.rows.start] for run in self.placement.runs]
        return in_order[0] if len(in_order) == 1 else mx.concatenate(in_order)

    def _slots(self, run: Run) -> list[list[mx.array]]:
        """Key and value planes [n, kv_heads, longest, width] of a run's slots."""
        return [[p[run.where, :, : run.longest] for p in planes] for planes in self.layer.slabs[run.slab.slab_id]]

    def _attend_alone(
        self, run: Run, queries: mx.array, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array:
        """Attention of a run's queries, out of those of the batch, over the tokens in its slots."""
        keys, values = self._slots(run)
        q = queries if len(self.placement.runs) == 1 else queries[run.rows]
        (mask,) = run.masks(window)
        if self.layer.kv_bits is None:
            return decode_attention(q, keys[0], values[0], scale, mask, sinks)
        assert sinks is None, "mlx-lm has no quantized attention with sinks"
        bits, size = self.layer.kv_bits.bits, self.layer.kv_bits.group_size
        out: mx.array = quantized_attention(q[:], tuple(keys), tuple(values), scale, mask, size, bits)
        return out

    def _attend_sharing(
        self,
        prefix: SharedPrefix,
        runs: list[Run],
        queries: mx.array,
        scale: float,
        window: int | None,
        sinks: mx.array | None,
    ) -> list[mx.array]:
        """Each run's attention, as in `_attend_alone`, over the prefix of all of them and the tokens in its own slots.

        The prefix is read once, in one product for all rows and heads that share it, and never copied. On a BLAS that
        adds up in order of the tokens, as the wheel's does, the result is bitwise what it is without sharing; on
        others, or where values are quantized, within 1e-6 of it in float32.
        """
        prefix_keys, prefix_values = self.layer.prefixes[prefix.prefix_id]
        slots = [self._slots(run) for run in runs]
        heads, kv_heads = queries.shape[1], prefix_keys[0].shape[1]
        tokens = sum(run.num_rows * (prefix.num_tokens + run.longest) for run in runs)
        softmax = softmax_for(heads * tokens // len(runs), queries.dtype)
        scaled = queries * (scale * softmax.factor)
        grouped = [scaled[run.rows].reshape(-1, kv_heads, heads // kv_heads, scaled.shape[-1]) for run in runs]
        prefix_scores = self._folded_product(grouped, prefix_keys, True)
        weights, totals = [], []
        for run, q, first, (keys, _) in zip(runs, grouped, prefix_scores, slots, strict=True):
            parts, total = softmax.weigh([first, self._product(q, keys, True)], run.masks(window), sinks)
            weights.append(parts)
            totals.append(total)
        outs = []
        prefix_outs = self._folded_product([first for first, _ in weights], prefix_values, False)
        for (_, w), total, out, (_, values) in zip(weights, totals, prefix_outs, slots, strict=True):
            # addmm goes on adding up where the prefix ended
            plain = self.layer.kv_bits is None
            out = mx.addmm(out, w, values[0]) if plain else out + self._product(w, values, False)
            outs.append((out / total).reshape(out.shape[0], heads, 1, out.shape[-1]))
        return outs

    def _folded_product(self, parts: list[mx.array], planes: list[mx.array], transpose: bool) -> list[mx.array]:
        """The product of each [n, kv_heads, heads per kv_head, …] with planes of [1, kv_heads, …], all in one."""
        x = mx.concatenate(parts).swapaxes(0, 1)
        kv_heads, rows, each, _ = x.shape
        out = self._product(x.reshape(1, kv_heads, rows * each, -1), planes, transpose)
        ends: Any = list(accumulate(len(part) for part in parts))
        return list(mx.split(out.reshape(kv_heads, rows, each, -1).swapaxes(0, 1), ends[:-1]))

    def _product(self, x: mx.array, planes: list[mx.array], transpose: bool) -> mx.array:
        """The product of `x` with the array that the planes store, its last two axes swapped if `transpose` is set."""
        if self.layer.kv_bits is None:
            return x @ (planes[0].swapaxes(-1, -2) if transpose else planes[0])
        bits, size = self.layer.kv_bits.bits, self.layer.kv_bits.group_size
        out: mx.array = quantized_matmul(x, *planes, transpose=transpose, group_size=size, bits=bits)
        return out
