"""Holds the rows of models that run on our own attention: slots, ring buffers for windows, joined recurrent states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_mcp.core.slots import KvCost, SharedPrefix, Slab, Slot
from mlx_mcp.core.steps import Admission, Chunk, Move, Restore
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.cache_tree import leaves, regroup
from mlx_mcp.mlx_backend.cpu.memory import copy_tokens
from mlx_mcp.mlx_backend.decode_cache import DecodeCache
from mlx_mcp.mlx_backend.layers import Codec
from mlx_mcp.mlx_backend.placement import place
from mlx_mcp.mlx_backend.prefill_cache import PrefillBatchCache, PrefillCache
from mlx_mcp.mlx_backend.rows import Batch, Rows, settle, spans
from mlx_mcp.mlx_backend.slabs import FullLayer, KvBits, Planes, num_shared
from mlx_mcp.mlx_backend.states import JoinedStates
from mlx_mcp.mlx_backend.window_cache import WindowCache

# A pass reads the weights once, which takes as long as some 20 tokens: padded by more, a row is faster alone.
PAD_TOKENS = 16


class SlottedRows(Rows):
    """Rows in slots of FULL layers, each with ring buffers of its own for WINDOW layers, and with joined states."""

    def __init__(self, model: Any, cost: KvCost, codec: Codec, kv_bits: KvBits | None) -> None:
        super().__init__(model, cost, codec)
        self.template = make_prompt_cache(model)
        self.layers = {i: FullLayer(kv_bits) for i, leaf in enumerate(leaves(self.template)) if type(leaf) is KVCache}
        self.by_row = len(self.layers) < len(leaves(self.template))  # rings and states take one row's chunk at a time
        self.slots: dict[int, Slot] = {}
        self.prefixes: dict[int, SharedPrefix | None] = {}
        self.states = JoinedStates([i for i, leaf in enumerate(leaves(self.template)) if type(leaf) is ArraysCache])

    @property
    def nbytes(self) -> int:
        """See Rows.nbytes."""
        full = sum(layer.nbytes for layer in self.layers.values())
        return super().nbytes + full + self.states.nbytes

    def passes(self, chunks: tuple[Chunk, ...]) -> list[list[Chunk]]:
        """See Rows.passes: last chunks of prompts go together where they are about equally long.

        On a GPU the chunks of one row go through the model as one, and those of several rows that are equally long
        together: each pass reads all weights once. Where tokens are cut does not depend on it.
        """
        if self.by_row:
            return super().passes(chunks)
        if device.on_cpu():
            passes = [[chunk] for chunk in chunks if not chunk.last]  # first: the last chunk of a prompt may follow
        else:
            alike: dict[int, list[Chunk]] = {}
            chunks = whole(chunks)
            for chunk in chunks:
                if not chunk.last:
                    alike.setdefault(size(chunk), []).append(chunk)
            passes = list(alike.values())
        ends: list[list[Chunk]] = []
        for chunk in (chunk for chunk in chunks if chunk.last):
            near = (end for end in ends if all(abs(size(chunk) - size(other)) <= PAD_TOKENS for other in end))
            into = next(near, None)
            if into is None:
                ends.append([chunk])
            else:
                into.append(chunk)
        return passes + ends

    def together(self, chunks: list[Chunk]) -> list[Any]:
        """See Rows.together."""
        if len(chunks) == 1:
            return super().together(chunks)
        sizes = [size(chunk) for chunk in chunks]
        layers = zip(*(leaves(self.caches_of(chunk)) for chunk in chunks), strict=True)
        return regroup(self.template, [PrefillBatchCache(list(rows), sizes) for rows in layers])

    def caches_of(self, chunk: Chunk) -> list[Any]:
        """See Rows.caches_of."""
        sequence_id = chunk.sequence_id
        caches = list(super().caches_of(chunk))
        for i, layer in self.layers.items():
            caches[i] = PrefillCache(layer, self.slots[sequence_id], chunk.start, self.prefixes[sequence_id])
        return regroup(self.template, caches)

    def admit(self, admission: Admission) -> None:
        """See Rows.admit."""
        self.slots[admission.sequence_id], self.prefixes[admission.sequence_id] = admission.slot, admission.prefix

    def begin(self, sequence_id: int, num_tokens: int = 0) -> None:
        """See Rows.begin."""
        super().begin(sequence_id, num_tokens)
        fresh = leaves(self.own[sequence_id])
        self.own[sequence_id] = [None if i in self.layers else leaf for i, leaf in enumerate(fresh)]
        shared = num_shared(self.prefixes[sequence_id])
        for layer in self.layers.values():
            layer.zero(self.slots[sequence_id], num_tokens - shared if num_tokens else 0)

    def batches(self, sequence_ids: list[int]) -> list[Batch]:
        """One batch, in order of slab and slot."""
        if not sequence_ids:
            return []
        ids = sorted(sequence_ids, key=lambda i: (self.slots[i].slab.slab_id, self.slots[i].index))
        placement = place([(self.slots[i], self.lengths[i], self.prefixes[i]) for i in ids])
        self.states.join(ids, self.own)
        caches: list[Any] = []
        for i, leaf in enumerate(leaves(self.template)):
            if i in self.layers:
                caches.append(DecodeCache(self.layers[i], placement))
            elif i in self.states.caches:
                caches.append(self.states.caches[i])
            else:
                assert type(leaf) is RotatingKVCache
                caches.append(WindowCache([self.own[j][i] for j in ids]))
        for i in ids:
            self.lengths[i] += 1
        return [(ids, regroup(self.template, caches))]

    def arrays(self, sequence_ids: list[int]) -> list[Any]:
        """See Rows.arrays."""
        slabs = {self.slots[i].slab.slab_id for i in sequence_ids if i in self.slots}
        full = [layer.slabs.get(slab_id) for layer in self.layers.values() for slab_id in slabs]
        return [*super().arrays(sequence_ids), *full, *self.states.arrays]

    def move(self, move: Move) -> None:
        """Copy a row to its new slot, if it has begun."""
        sequence_id = move.sequence_id
        self.slots[sequence_id] = move.new
        length = self.lengths.get(sequence_id, 0) - num_shared(self.prefixes[sequence_id])
        for layer in self.layers.values():
            if length > 0:
                layer.zero(move.new)
                layer.copy(move.old, move.new, length)
        self._drop_unused()

    def release(self, sequence_id: int) -> bool:
        """See Rows.release."""
        slot = self.slots.pop(sequence_id, None)
        if slot is not None:
            del self.prefixes[sequence_id]
            self._drop_unused()
        self.states.remove(sequence_id)
        return super().release(sequence_id)

    def _fill(self, restore: Restore) -> None:
        """See Rows._fill; the first row that shares a prefix writes it for all."""
        sequence_id = restore.sequence_id
        prefix, shared = self.prefixes[sequence_id], num_shared(self.prefixes[sequence_id])
        if prefix is not None and not all(prefix.prefix_id in layer.prefixes for layer in self.layers.values()):
            slab = Slab(-1, shared, num_slots=1)
            self._write(Slot(slab, 0), restore, 0, shared)
            for layer in self.layers.values():
                layer.prefixes[prefix.prefix_id] = layer.slabs.pop(slab.slab_id)
        self._write(self.slots[sequence_id], restore, shared, restore.num_tokens)

    def _write(self, slot: Slot, restore: Restore, first: int, last: int) -> None:
        """Write tokens [first, last) to a slot, from its beginning on."""
        if device.on_cpu():
            like = self.codec.tokens(restore.parts, 0, 1)
            slabs = {i: self.layers[i].planes(slot.slab, halves(planes)) for i, planes in like.items()}
            mx.eval(list(slabs.values()))
            both = {i: [*keys, *values] for i, (keys, values) in slabs.items()}
            copy_tokens(self.codec.full, restore.parts, first, last, both, slot.index)
            return
        for number, (start, end) in enumerate(spans(first, last), 1):
            for i, planes in self.codec.tokens(restore.parts, start, end).items():
                self.layers[i].write(slot, start - first, *halves(planes))
            settle([layer.slabs[slot.slab.slab_id] for layer in self.layers.values()], number)

    def _read(self, sequence_id: int, i: int, start: int, end: int) -> list[mx.array]:
        """See Rows._read."""
        if i not in self.layers:
            return super()._read(sequence_id, i, start, end)
        layer, slot, prefix = self.layers[i], self.slots[sequence_id], self.prefixes[sequence_id]
        shared, n, pieces = num_shared(prefix), slot.index, []
        if prefix is not None and start < shared:
            stored = layer.prefixes[prefix.prefix_id]
            pieces.append([x[..., start : min(end, shared), :] for planes in stored for x in planes])
        if end > shared:
            where = slice(max(start - shared, 0), end - shared)
            stored = layer.slabs[slot.slab.slab_id]
            pieces.append([x[n : n + 1, :, where] for planes in stored for x in planes])
        return pieces[0] if len(pieces) == 1 else [mx.concatenate(list(ab), axis=2) for ab in zip(*pieces, strict=True)]

    def _leaf(self, sequence_id: int, i: int) -> Any:
        """See Rows._leaf."""
        own = self.own[sequence_id][i]
        return self.states.extract(sequence_id, i) if own is None else own

    def _drop_unused(self) -> None:
        """Forget every slab and prefix that has no row, and a slab that a failed move was to fill."""
        slabs = {slot.slab.slab_id for slot in self.slots.values()}
        prefixes = {prefix.prefix_id for prefix in self.prefixes.values() if prefix is not None}
        for layer in self.layers.values():
            for slab_id in layer.slabs.keys() - slabs:
                del layer.slabs[slab_id]
            for prefix_id in layer.prefixes.keys() - prefixes:
                del layer.prefixes[prefix_id]


def whole(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    """The chunks of each row as one, which ends where the last of them does."""
    rows: dict[int, Chunk] = {}
    for chunk in chunks:
        first = rows.get(chunk.sequence_id, chunk)
        rows[chunk.sequence_id] = replace(chunk, start=first.start)
    return tuple(rows.values())


def size(chunk: Chunk) -> int:
    """The number of its tokens."""
    return chunk.end - chunk.start


def halves(planes: list[mx.array]) -> tuple[Planes, Planes]:
    """A layer's planes: those of its keys, and those of its values."""
    return tuple(planes[: len(planes) // 2]), tuple(planes[len(planes) // 2 :])
