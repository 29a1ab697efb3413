"""Holds the keys and values of a model's live rows, and hands them to the model as the caches it expects.

Three ways, chosen by what the architecture allows: our own attention over slots and rings; mlx-lm's padded batch caches;
each row by itself, for caches that nothing can batch. Engine thread only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from mlx_mcp.core.scheduler import Chunk, Move
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import KvCost, Slot
from mlx_mcp.errors import ModelError
from mlx_mcp.mlx_backend.attention import (
    FullLayer,
    KvBits,
    RingsCache,
    RowCache,
    SlotsCache,
    code,
    hook,
    join_states,
    plan,
)

# Model files of mlx-lm that touch keys and values through their cache and `scaled_dot_product_attention` alone.
# tests/mlx_backend/test_architectures.py proves each of them.
ALLOWED = frozenset({"llama", "gemma3_text", "qwen3_next", "mamba2"})

ALONE: frozenset[str] = frozenset()

Batch = tuple[list[Sequence], list[Any]]  # rows that go through the model together, and the caches to go with


class Rows(ABC):
    """The live rows of one model."""

    def __init__(self, model: Any, cost: KvCost) -> None:
        self.model, self.cost = model, cost
        self.lengths: dict[int, int] = {}  # sequence id → tokens whose keys and values are computed or being so
        self.own: dict[int, list[Any]] = {}  # sequence id → caches of that row alone

    @property
    def nbytes(self) -> int:
        """What all rows take now."""
        return sum(cache.nbytes for caches in self.own.values() for cache in caches if cache is not None)

    def one(self, chunk: Chunk) -> list[Any]:
        """The caches to compute a chunk with; the first chunk of a sequence makes its row."""
        sequence_id = chunk.sequence.sequence_id
        if chunk.start == 0:
            self.own[sequence_id] = make_prompt_cache(self.model)
        self.lengths[sequence_id] = chunk.end
        return self.own[sequence_id]

    @abstractmethod
    def batches(self, sequences: list[Sequence]) -> list[Batch]:
        """The rows, ordered and grouped as they go through the model with one more token each."""

    def arrays(self, sequences: list[Sequence]) -> list[Any]:
        """What must be evaluated for these rows after a forward pass."""
        own = (self.own.get(sequence.sequence_id, []) for sequence in sequences)
        return [cache.state for caches in own for cache in caches if cache is not None]

    def move(self, move: Move) -> None:
        """Take a row to a larger slot; nothing to do where rows have none."""

    def release(self, sequence_id: int) -> bool:
        """Forget a row; returns whether there was one."""
        self.own.pop(sequence_id, None)
        return self.lengths.pop(sequence_id, None) is not None


class SoloRows(Rows):
    """Each row by itself."""

    def batches(self, sequences: list[Sequence]) -> list[Batch]:
        """One batch for each row."""
        for sequence in sequences:
            self.lengths[sequence.sequence_id] += 1
        return [([sequence], self.own[sequence.sequence_id]) for sequence in sequences]


class PaddedRows(Rows):
    """mlx-lm's batch caches: every row as long as the longest, copied at each join and leave."""

    def __init__(self, model: Any, cost: KvCost) -> None:
        super().__init__(model, cost)
        self.members: list[Sequence] = []
        self.batch: list[Any] = []

    @property
    def nbytes(self) -> int:
        """See Rows.nbytes."""
        return super().nbytes + sum(cache.nbytes for cache in self.batch)

    def batches(self, sequences: list[Sequence]) -> list[Batch]:
        """One batch; who left is cut out of it, who is new is merged in."""
        if not sequences:
            return []
        stay = [i for i, member in enumerate(self.members) if member in sequences and member.sequence_id not in self.own]
        if not stay:
            self.batch = []
        elif len(stay) < len(self.members):
            for cache in self.batch:
                cache.filter(stay)
        self.members = [self.members[i] for i in stay]
        new = [sequence for sequence in sequences if sequence not in self.members]
        if new:
            rows = zip(*(self.own.pop(sequence.sequence_id) for sequence in new), strict=True)
            merged = [caches[0].merge(list(caches)) for caches in rows]
            for cache, more in zip(self.batch, merged, strict=bool(self.batch)):
                cache.extend(more)
            self.batch = self.batch or merged
            self.members += new
        for sequence in sequences:
            self.lengths[sequence.sequence_id] += 1
        return [(self.members, self.batch)]

    def arrays(self, sequences: list[Sequence]) -> list[Any]:
        """See Rows.arrays."""
        return super().arrays(sequences) + [cache.state for cache in self.batch]

    def release(self, sequence_id: int) -> bool:
        """See Rows.release; the batch is cut at the next step."""
        there = super().release(sequence_id)
        if not self.lengths:
            self.members, self.batch = [], []
        return there


class SlottedRows(Rows):
    """Our own attention: slots for layers that keep every token, rings for windows, recurrent states in one tensor."""

    def __init__(self, model: Any, cost: KvCost, kv_bits: KvBits | None) -> None:
        super().__init__(model, cost)
        self.template = make_prompt_cache(model)
        self.layers = {i: FullLayer(kv_bits) for i, leaf in enumerate(leaves(self.template)) if type(leaf) is KVCache}
        self.slots: dict[int, Slot] = {}
        self.joined_ids: list[int | None] = []  # whose states are in `joined`, in its order
        self.joined: dict[int, ArraysCache] = {}

    @property
    def nbytes(self) -> int:
        """See Rows.nbytes."""
        full = sum(layer.nbytes for layer in self.layers.values())
        return super().nbytes + full + sum(cache.nbytes for cache in self.joined.values())

    def one(self, chunk: Chunk) -> list[Any]:
        """See Rows.one."""
        sequence_id, slot = chunk.sequence.sequence_id, chunk.sequence.slot
        assert slot is not None, f"sequence {sequence_id} runs without a slot"
        if chunk.start == 0:
            fresh = leaves(make_prompt_cache(self.model))
            self.own[sequence_id] = [None if i in self.layers else leaf for i, leaf in enumerate(fresh)]
            self.slots[sequence_id] = slot
            for layer in self.layers.values():
                layer.scrub(slot)
        caches = list(self.own[sequence_id])
        for i, layer in self.layers.items():
            caches[i] = RowCache(layer, slot, chunk.start)
        self.lengths[sequence_id] = chunk.end
        return regroup(self.template, caches)

    def batches(self, sequences: list[Sequence]) -> list[Batch]:
        """One batch, in order of slab and slot."""
        if not sequences:
            return []
        ordered = sorted(sequences, key=lambda s: (self._slot(s).slab.slab_id, self._slot(s).index))
        ids = [sequence.sequence_id for sequence in ordered]
        where = plan([(self.slots[i], self.lengths[i]) for i in ids])
        self._join(ids)
        caches = []
        for i, leaf in enumerate(leaves(self.template)):
            if i in self.layers:
                caches.append(SlotsCache(self.layers[i], where))
            elif i in self.joined:
                caches.append(self.joined[i])
            else:
                assert type(leaf) is RotatingKVCache
                caches.append(RingsCache([self.own[j][i] for j in ids]))
        for i in ids:
            self.lengths[i] += 1
        return [(ordered, regroup(self.template, caches))]

    def arrays(self, sequences: list[Sequence]) -> list[Any]:
        """See Rows.arrays."""
        slabs = {self.slots[s.sequence_id].slab.slab_id for s in sequences if s.sequence_id in self.slots}
        full = [layer.slabs[slab_id] for layer in self.layers.values() for slab_id in slabs]
        return [*super().arrays(sequences), *full, *(cache.state for cache in self.joined.values())]

    def move(self, move: Move) -> None:
        """Copy a row to its new slot."""
        sequence_id = move.sequence.sequence_id
        self.slots[sequence_id] = move.new
        for layer in self.layers.values():
            layer.copy(move.old, move.new, self.lengths[sequence_id])
        self._drop_slab(move.old)

    def release(self, sequence_id: int) -> bool:
        """See Rows.release."""
        slot = self.slots.pop(sequence_id, None)
        if slot is not None:
            self._drop_slab(slot)
        self.joined_ids = [None if i == sequence_id else i for i in self.joined_ids]
        if all(i is None for i in self.joined_ids):
            self.joined_ids, self.joined = [], {}
        return super().release(sequence_id)

    def _slot(self, sequence: Sequence) -> Slot:
        return self.slots[sequence.sequence_id]

    def _drop_slab(self, slot: Slot) -> None:
        """Forget the tensors of a slab that has no row."""
        if all(other.slab != slot.slab for other in self.slots.values()):
            for layer in self.layers.values():
                layer.slabs.pop(slot.slab.slab_id, None)

    def _join(self, ids: list[int]) -> None:
        """Lay the rows' recurrent states side by side in this order; no work while the rows are the same."""
        if ids == self.joined_ids:
            return
        at = {sequence_id: row for row, sequence_id in enumerate(self.joined_ids)}
        joined = {}
        for i, leaf in enumerate(leaves(self.template)):
            if type(leaf) is ArraysCache:
                rows = [self.joined[i].extract(at[j]) if j in at else self.own[j][i] for j in ids]
                joined[i] = join_states(rows)
        if joined:
            self.joined_ids, self.joined = list(ids), joined
            for j in ids:
                self.own[j] = [None if i in joined else cache for i, cache in enumerate(self.own[j])]


def make_rows(model: Any, kv_bits: int | None) -> Rows:
    """The best way to hold this model's rows.

    Raises:
        ModelError: `kv_bits` is set, and the model's keys and values cannot be quantized.
    """
    caches = make_prompt_cache(model)
    kinds = {type(leaf) for leaf in leaves(caches)}
    slotted = way(model, kinds) is SlottedRows
    model(mx.array([[0]]), cache=caches)  # to see what its keys and values look like
    mx.eval([cache.state for cache in caches])
    quantized = None
    if kv_bits is not None:
        quantized = KvBits(kv_bits, group_size(leaves(caches))) if slotted else None
        if quantized is None:
            raise ModelError(
                f"Keys and values of the architecture {architecture(model)!r} cannot be quantized. Start the server "
                "without kv_bits, or choose another model."
            )
    cost = kv_cost(leaves(caches), quantized)
    if slotted:
        hook(model)
        return SlottedRows(model, cost, quantized)
    return way(model, kinds)(model, cost)


def way(model: Any, kinds: set[type]) -> type[Rows]:
    """How the rows of a model with these kinds of caches go through it."""
    files = {m.__name__.rpartition(".")[2] for m in code(model) if hasattr(m, "Model")}
    if files & ALONE or any(type(m).__name__ == "DynamicNTKScalingRoPE" for m in model.modules()):
        return SoloRows
    if files <= ALLOWED and kinds <= {KVCache, RotatingKVCache, ArraysCache}:
        return SlottedRows
    return PaddedRows if all(hasattr(kind, "merge") for kind in kinds) else SoloRows


def architecture(model: Any) -> str:
    """The name of the model's file in mlx-lm."""
    return type(model).__module__.rpartition(".")[2]


def leaves(caches: list[Any]) -> list[Any]:
    """The caches with every list among them opened."""
    return [leaf for cache in caches for leaf in (leaves(cache.caches) if isinstance(cache, CacheList) else [cache])]


def regroup(template: list[Any], flat: list[Any]) -> list[Any]:
    """The leaves put back into lists as in the template."""
    rest = iter(flat)

    def fill(caches: Any) -> list[Any]:
        return [CacheList(*fill(c.caches)) if isinstance(c, CacheList) else next(rest) for c in caches]

    return fill(template)


def group_size(caches: list[Any]) -> int:
    """The largest group that divides every head.

    Raises:
        ModelError: none does.
    """
    widths = {array.shape[-1] for cache in caches if type(cache) is KVCache for array in (cache.keys, cache.values)}
    for size in (64, 32):
        if widths and all(width % size == 0 for width in widths):
            return size
    raise ModelError("The model's keys and values cannot be quantized: no head is a multiple of 32 wide.")


def kv_cost(caches: list[Any], quantized: KvBits | None) -> KvCost:
    """What a row costs, told from caches that hold one token."""
    token_bytes, state_bytes, windows = 0, 0, []
    for cache in caches:
        if type(cache) is KVCache:
            layer = FullLayer(quantized)
            one = [plane for x in (cache.keys, cache.values) for plane in layer.encode(x[..., :1, :])]
            token_bytes += sum(plane.nbytes for plane in one)
        elif type(cache) is RotatingKVCache:
            each = cache.nbytes // cache.keys.shape[2]
            windows.append((cache.max_size, each))
            state_bytes += cache.step * each  # what mlx-lm's ring keeps in reserve
        else:
            state_bytes += cache.nbytes
    return KvCost(token_bytes, tuple(windows), state_bytes)
