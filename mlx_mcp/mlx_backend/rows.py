"""Holds the keys and values of a model's live rows, and hands them to the model as the caches it expects.

Three ways, chosen by what the architecture allows: our own attention over slots and rings; mlx-lm's padded batch
caches; each row by itself, for models that nothing can batch. Engine thread only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_mcp.core.scheduler import Chunk, Move
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import KvCost, Slab, Slot
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
# tests/mlx_backend/test_architectures.py proves each of them, here and in ALONE.
ALLOWED = frozenset(
    """
    Klear afmoe apertus baichuan_m1 bailing_moe bailing_moe_linear cohere cohere2 dbrx deepseek deepseek_v2 dots1
    ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 gemma gemma3 gemma3_text gemma3n gemma4 gemma4_text glm
    glm4 glm4_moe gpt2 gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense
    internlm2 internlm3 iquestloopcoder jamba laguna lfm2 lfm2-vl lfm2_moe lille-130m llama llama4_text mamba mamba2
    mellum mimo mimo_v2_flash minicpm minicpm3 minimax ministral3 mistral3 mixtral muse_glimmer nanbeige nanochat
    nemotron nemotron-nas nemotron_h olmo2 olmo3 olmo_hybrid olmoe openelm phi phi3 phimoe phixtral pixtral plamo3 qwen
    qwen2 qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma rwkv7
    seed_oss smollm3 spark2_5 starcoder2 step3p5 talkie telechat3 youtu_llm
    """.split()
)
# Model files that fail or, worse, answer wrongly when the rows of a batch are padded to one length.
ALONE = frozenset("afm7 gemma2 gpt_bigcode longcat_flash_ngram minimax_m3_vl phi3small".split())

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

    def move(self, move: Move) -> None:  # noqa: B027  # not every way has slots
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
        return super().nbytes + sum(int(cache.nbytes) for cache in self.batch)

    def batches(self, sequences: list[Sequence]) -> list[Batch]:
        """One batch; who left is cut out of it, who is new is merged in."""
        if not sequences:
            return []
        # Who was computed again since has caches of its own, and is as good as new.
        there = [member in sequences and member.sequence_id not in self.own for member in self.members]
        stay = [i for i, still in enumerate(there) if still]
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
        """See Rows.release; of a batch that others are in, the row is cut out at the next step."""
        there = super().release(sequence_id)
        if not any(m.sequence_id in self.lengths and m.sequence_id not in self.own for m in self.members):
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
        self.joined: dict[int, Any] = {}  # place among the caches → ArraysCache

    @property
    def nbytes(self) -> int:
        """See Rows.nbytes."""
        full = sum(layer.nbytes for layer in self.layers.values())
        return super().nbytes + full + sum(int(cache.nbytes) for cache in self.joined.values())

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
        caches: list[Any] = []
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
            layer.scrub(move.new)
            layer.copy(move.old, move.new, self.lengths[sequence_id])
        self._drop_slabs()

    def release(self, sequence_id: int) -> bool:
        """See Rows.release."""
        slot = self.slots.pop(sequence_id, None)
        if slot is not None:
            self._drop_slabs()
        self.joined_ids = [None if i == sequence_id else i for i in self.joined_ids]
        if all(i is None for i in self.joined_ids):
            self.joined_ids, self.joined = [], {}
        return super().release(sequence_id)

    def _slot(self, sequence: Sequence) -> Slot:
        return self.slots[sequence.sequence_id]

    def _drop_slabs(self) -> None:
        """Forget the tensors of every slab that has no row, also of one that a move which failed was to fill."""
        held = {slot.slab.slab_id for slot in self.slots.values()}
        for layer in self.layers.values():
            for slab_id in layer.slabs.keys() - held:
                del layer.slabs[slab_id]

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


def make_rows(model: Any, kv_bits: int | None, chunk_tokens: int) -> Rows:
    """The best way to hold this model's rows; no chunk is longer than `chunk_tokens`.

    Raises:
        ModelError: `kv_bits` is set, and the model's keys and values cannot be quantized.
    """
    caches = make_prompt_cache(model)
    rows = way(model, {type(leaf) for leaf in leaves(caches)})
    model(mx.array([[0]]), cache=caches)  # to see what its keys and values look like
    mx.eval([cache.state for cache in caches])
    if rows is SlottedRows:
        hook(model)
        quantized = None if kv_bits is None else KvBits(kv_bits, group_size(leaves(caches)))
        if quantized is not None:
            try_quantized(model, quantized)
        return SlottedRows(model, kv_cost(leaves(caches), quantized, SlottedRows, chunk_tokens), quantized)
    if kv_bits is not None:
        raise not_quantizable(f"The architecture {architecture(model)!r} reads them itself.")
    return rows(model, kv_cost(leaves(caches), None, rows, chunk_tokens))


def way(model: Any, kinds: set[type]) -> type[Rows]:
    """How the rows of a model with these kinds of caches go through it."""
    files = {module.__name__.rpartition(".")[2] for module in code(model) if hasattr(module, "Model")}
    # Its frequencies go by the length of the one sequence that it takes.
    dynamic = any(type(module).__name__ == "DynamicNTKScalingRoPE" for module in model.modules())
    if dynamic or files & ALONE:
        return SoloRows
    if files <= ALLOWED and kinds <= {KVCache, RotatingKVCache, ArraysCache}:
        return SlottedRows
    return PaddedRows if all(hasattr(kind, "merge") for kind in kinds) else SoloRows


def architecture(model: Any) -> str:
    """The name of the model's file in mlx-lm."""
    return type(model).__module__.rpartition(".")[2]


def leaves(caches: Iterable[Any]) -> list[Any]:
    """The caches with every list among them opened."""
    return [leaf for cache in caches for leaf in (leaves(cache.caches) if isinstance(cache, CacheList) else [cache])]


def regroup(template: Iterable[Any], flat: Iterable[Any]) -> list[Any]:
    """The leaves put back into lists as in the template."""
    # No function inside that calls itself: such a cycle would keep the caches until the garbage is collected.
    rest, group = iter(flat), cast(Any, CacheList)
    return [group(*regroup(c.caches, rest)) if isinstance(c, CacheList) else next(rest) for c in template]


def group_size(caches: list[Any]) -> int:
    """The largest group that divides every head.

    Raises:
        ModelError: none does.
    """
    full: list[Any] = [cache for cache in caches if type(cache) is KVCache]
    widths = {array.shape[-1] for cache in full for array in (cache.keys, cache.values)}
    if not widths:
        raise not_quantizable("No layer keeps those of every token.")
    for size in (64, 32):
        if all(width % size == 0 for width in widths):
            return size
    raise not_quantizable(
        f"Heads must be a multiple of 32 wide; here they are {' and '.join(map(str, sorted(widths)))}."
    )


def try_quantized(model: Any, kv_bits: KvBits) -> None:
    """Let the model's attention be asked for one quantized token; nothing is computed.

    Raises:
        ModelError: mlx-lm has no quantized attention of this kind.
    """
    template, slot = make_prompt_cache(model), Slot(Slab(0, capacity=1, num_slots=1), 0)
    flat = [RowCache(FullLayer(kv_bits), slot, 0) if type(leaf) is KVCache else leaf for leaf in leaves(template)]
    try:
        model(mx.array([[0]]), cache=regroup(template, flat))
    except ValueError as error:
        raise not_quantizable(f"mlx-lm says: {error}") from error


def not_quantizable(why: str) -> ModelError:
    """The error for a model whose keys and values cannot be quantized."""
    return ModelError(
        f"This model's keys and values cannot be quantized. {why} Start the server without kv_bits, or choose another "
        "model."
    )


def kv_cost(caches: list[Any], quantized: KvBits | None, rows: type[Rows], chunk_tokens: int) -> KvCost:
    """What a row costs at most, told from caches that hold one token."""
    token_bytes, state_bytes, windows = 0, 0, []
    layer = FullLayer(quantized)
    for cache in caches:
        kind = type(cache)
        if kind is KVCache:
            one = [plane for x in (cache.keys, cache.values) for plane in layer.encode(x[..., :1, :])]
            each = sum(plane.nbytes for plane in one)
            token_bytes += each
            state_bytes += 0 if rows is SlottedRows else cache.step * each  # what mlx-lm keeps in reserve
        elif kind in (RotatingKVCache, ChunkedKVCache):
            each = cache.nbytes // cache.keys.shape[2]
            windows.append((cache.max_size if kind is RotatingKVCache else cache.chunk_size, each))
            state_bytes += max(cache.step, chunk_tokens) * each  # a ring holds a whole chunk beside its window
        elif kind is ArraysCache:
            state_bytes += cache.nbytes
        else:  # a model's own: it may keep as much of every token
            token_bytes += cache.nbytes
    return KvCost(token_bytes, tuple(windows), state_bytes, padded=rows is PaddedRows)
