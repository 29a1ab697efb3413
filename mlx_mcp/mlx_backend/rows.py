"""Holds the keys and values of a model's live rows, and hands them to the model as the caches it expects.

Three ways, chosen by what the architecture allows: our own attention over slots and rings; mlx-lm's padded batch
caches; each row by itself, for models that nothing can batch. Engine thread only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import KvCost, SharedPrefix, Slab, Slot
from mlx_mcp.core.steps import Chunk, Move, Restore
from mlx_mcp.errors import ModelError
from mlx_mcp.mlx_backend.attention import (
    ChunksCache,
    FullLayer,
    KvBits,
    Planes,
    RingsCache,
    RowCache,
    SlotsCache,
    code,
    hook,
    join_states,
    num_shared,
    plan,
)
from mlx_mcp.mlx_backend.layers import Codec, KvPayload, put, read

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

# A pass reads the weights once, which takes as long as some 20 tokens do: padded by more, a row is better off alone.
PAD_TOKENS = 16
async_eval: Any = mx.async_eval  # which has no types
SPAN_TOKENS = 1024  # laid end to end at a time: a restore takes as much beside its row

Batch = tuple[list[Sequence], list[Any]]  # rows that go through the model together, and the caches to go with


class Rows(ABC):
    """The live rows of one model."""

    def __init__(self, model: Any, cost: KvCost, codec: Codec) -> None:
        self.model, self.cost, self.codec = model, cost, codec
        self.lengths: dict[int, int] = {}  # sequence id → tokens whose keys and values are computed or being so
        self.own: dict[int, list[Any]] = {}  # sequence id → caches of that row alone

    @property
    def nbytes(self) -> int:
        """What all rows take now."""
        return sum(cache.nbytes for caches in self.own.values() for cache in caches if cache is not None)

    def passes(self, chunks: tuple[Chunk, ...]) -> list[list[Chunk]]:
        """Which of a step's chunks go through the model together, each pass after the one before."""
        return [[chunk] for chunk in chunks]

    def together(self, chunks: list[Chunk]) -> list[Any]:
        """The caches to compute a pass with, a row for each chunk, as long as the longest."""
        (chunk,) = chunks
        return self.one(chunk)

    def one(self, chunk: Chunk) -> list[Any]:
        """The caches to compute a chunk with; makes the row, unless it was restored or has begun."""
        sequence_id = chunk.sequence.sequence_id
        if sequence_id not in self.lengths:
            self.begin(chunk.sequence)
        assert self.lengths[sequence_id] == chunk.start, f"a gap or an overlap in row {sequence_id}"
        self.lengths[sequence_id] = chunk.end
        return self.own[sequence_id]

    def begin(self, sequence: Sequence, num_tokens: int = 0) -> None:
        """Make a row of no tokens; `num_tokens` are put in it at once."""
        self.lengths[sequence.sequence_id] = 0
        self.own[sequence.sequence_id] = make_prompt_cache(self.model)

    def restore(self, restore: Restore) -> None:
        """Make a row of what was cut out of rows.

        Waits for the copies: a tensor that is written to while it is being filled would be copied whole.
        """
        sequence, num_tokens = restore.sequence, restore.num_tokens
        self.begin(sequence, num_tokens)
        self._fill(restore)
        own = leaves(self.own[sequence.sequence_id])
        for i, planes in self.codec.latest(restore.parts, num_tokens).items():
            put(own[i], planes, num_tokens)
        self.lengths[sequence.sequence_id] = num_tokens
        mx.eval(self.arrays([sequence]))

    def cut(self, sequence_id: int, start: int, end: int, state: bool) -> KvPayload:
        """Copy tokens [start, end) out of a row, with its states if these are of that moment."""
        length = self.lengths[sequence_id]
        assert start < end <= length, f"tokens [{start}, {end}) of {length}"
        assert end == length or not state, f"states at {end} of a row of {length} tokens"
        payload = self.codec.cut(lambda i: self._read(sequence_id, i, start, end), start, end, state)
        async_eval(payload.arrays)  # at once: until it is done, it keeps what it reads from being written in place
        return payload

    @abstractmethod
    def batches(self, sequences: list[Sequence]) -> list[Batch]:
        """The rows, ordered and grouped as they go through the model with one more token each."""

    def arrays(self, sequences: list[Sequence]) -> list[Any]:
        """What must be evaluated for these rows after a forward pass."""
        own = (self.own.get(sequence.sequence_id, []) for sequence in sequences)
        return [cache.state for caches in own for cache in caches if cache is not None]

    def _fill(self, restore: Restore) -> None:
        """Put a restored row's tokens in the layers that keep all of them."""
        own = leaves(self.own[restore.sequence.sequence_id])
        for start, end in spans(0, restore.num_tokens):
            for i, planes in self.codec.tokens(restore.parts, start, end).items():
                own[i].update_and_fetch(*planes)
            mx.eval(self.arrays([restore.sequence]))

    def _read(self, sequence_id: int, i: int, start: int, end: int) -> list[mx.array]:
        """See layers.read, of the row's i-th layer."""
        return read(self._leaf(sequence_id, i), start, end)

    def _leaf(self, sequence_id: int, i: int) -> Any:
        """The row's i-th layer as a cache of that row alone."""
        return leaves(self.own[sequence_id])[i]

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

    def __init__(self, model: Any, cost: KvCost, codec: Codec) -> None:
        super().__init__(model, cost, codec)
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
        for row, member in enumerate(self.members):  # who is left out may still be cut: extract computes nothing yet
            if member not in sequences and member.sequence_id in self.lengths.keys() - self.own.keys():
                self.own[member.sequence_id] = [cache.extract(row) for cache in self.batch]
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

    def _leaf(self, sequence_id: int, i: int) -> Any:
        """See Rows._leaf."""
        if sequence_id in self.own:
            return super()._leaf(sequence_id, i)
        row = [member.sequence_id for member in self.members].index(sequence_id)
        cache = leaves(self.batch)[i]
        kind = type(cache)
        if kind is not BatchKVCache:
            return cache.extract(row)
        alone = cast(Any, KVCache)()  # mlx-lm's extract copies it all, for a few tokens
        start, end = cache._idx - self.lengths[sequence_id], cache._idx
        alone.keys, alone.values = (x[row : row + 1, :, start:end] for x in (cache.keys, cache.values))
        return alone


class SlottedRows(Rows):
    """Our own attention: slots for layers that keep every token, rings for windows, recurrent states in one tensor."""

    def __init__(self, model: Any, cost: KvCost, codec: Codec, kv_bits: KvBits | None) -> None:
        super().__init__(model, cost, codec)
        self.template = make_prompt_cache(model)
        self.layers = {i: FullLayer(kv_bits) for i, leaf in enumerate(leaves(self.template)) if type(leaf) is KVCache}
        self.apart = len(self.layers) < len(leaves(self.template))  # rings and states take one row at a time
        self.slots: dict[int, Slot] = {}
        self.prefixes: dict[int, SharedPrefix | None] = {}
        self.joined_ids: list[int] = []  # whose states are in `joined`, in its order
        self.joined: dict[int, Any] = {}  # place among the caches → ArraysCache

    @property
    def nbytes(self) -> int:
        """See Rows.nbytes."""
        full = sum(layer.nbytes for layer in self.layers.values())
        return super().nbytes + full + sum(int(cache.nbytes) for cache in self.joined.values())

    def passes(self, chunks: tuple[Chunk, ...]) -> list[list[Chunk]]:
        """See Rows.passes: the ends of prompts that are about as long as each other go together."""
        if self.apart:
            return super().passes(chunks)
        passes = [[chunk] for chunk in chunks if not chunk.last]  # first, since some of them have their last here too
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
        layers = zip(*(leaves(self.one(chunk)) for chunk in chunks), strict=True)
        return regroup(self.template, [ChunksCache(list(rows), sizes) for rows in layers])

    def one(self, chunk: Chunk) -> list[Any]:
        """See Rows.one."""
        sequence_id = chunk.sequence.sequence_id
        caches = list(super().one(chunk))
        for i, layer in self.layers.items():
            caches[i] = RowCache(layer, self.slots[sequence_id], chunk.start, self.prefixes[sequence_id])
        return regroup(self.template, caches)

    def begin(self, sequence: Sequence, num_tokens: int = 0) -> None:
        """See Rows.begin."""
        sequence_id, slot = sequence.sequence_id, sequence.slot
        assert slot is not None, f"sequence {sequence_id} runs without a slot"
        super().begin(sequence, num_tokens)
        fresh = leaves(self.own[sequence_id])
        self.own[sequence_id] = [None if i in self.layers else leaf for i, leaf in enumerate(fresh)]
        self.slots[sequence_id], self.prefixes[sequence_id] = slot, sequence.prefix
        for layer in self.layers.values():
            layer.scrub(slot, num_tokens - num_shared(sequence.prefix) if num_tokens else 0)

    def batches(self, sequences: list[Sequence]) -> list[Batch]:
        """One batch, in order of slab and slot."""
        if not sequences:
            return []
        ordered = sorted(sequences, key=lambda s: (self._slot(s).slab.slab_id, self._slot(s).index))
        ids = [sequence.sequence_id for sequence in ordered]
        where = plan([(self.slots[i], self.lengths[i], self.prefixes[i]) for i in ids])
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
        full = [layer.slabs.get(slab_id) for layer in self.layers.values() for slab_id in slabs]
        return [*super().arrays(sequences), *full, *(cache.state for cache in self.joined.values())]

    def move(self, move: Move) -> None:
        """Copy a row to its new slot."""
        sequence_id = move.sequence.sequence_id
        self.slots[sequence_id] = move.new
        for layer in self.layers.values():
            layer.scrub(move.new)
            layer.copy(move.old, move.new, self.lengths[sequence_id] - num_shared(self.prefixes[sequence_id]))
        self._drop_unused()

    def release(self, sequence_id: int) -> bool:
        """See Rows.release."""
        slot = self.slots.pop(sequence_id, None)
        if slot is not None:
            del self.prefixes[sequence_id]
            self._drop_unused()
        if sequence_id in self.joined_ids:
            stay = [row for row, i in enumerate(self.joined_ids) if i != sequence_id]
            self.joined_ids, self.joined = [self.joined_ids[row] for row in stay], self.joined if stay else {}
            for cache in self.joined.values():
                cache.filter(stay)
        return super().release(sequence_id)

    def _slot(self, sequence: Sequence) -> Slot:
        return self.slots[sequence.sequence_id]

    def _fill(self, restore: Restore) -> None:
        """See Rows._fill; the first row with a shared prefix brings it."""
        sequence_id = restore.sequence.sequence_id
        prefix, shared = self.prefixes[sequence_id], num_shared(self.prefixes[sequence_id])
        if prefix is not None and not all(prefix.prefix_id in layer.prefixes for layer in self.layers.values()):
            alone = Slab(-1, shared, num_slots=1)
            self._write(Slot(alone, 0), restore, 0, shared)
            for layer in self.layers.values():
                layer.prefixes[prefix.prefix_id] = layer.slabs.pop(alone.slab_id)
        self._write(self.slots[sequence_id], restore, shared, restore.num_tokens)

    def _write(self, slot: Slot, restore: Restore, first: int, last: int) -> None:
        """Put tokens [first, last) into a slot, from its beginning on."""
        if in_reach():
            like = self.codec.tokens(restore.parts, 0, 1)
            slabs = {i: self.layers[i].planes(slot.slab, halves(planes)) for i, planes in like.items()}
            mx.eval(list(slabs.values()))
            places = {i: [*keys, *values] for i, (keys, values) in slabs.items()}
            self.codec.pour(restore.parts, first, last, places, slot.index)
            return
        for start, end in spans(first, last):
            for i, planes in self.codec.tokens(restore.parts, start, end).items():
                self.layers[i].write(slot, start - first, *halves(planes))
            mx.eval([layer.slabs[slot.slab.slab_id] for layer in self.layers.values()])

    def _read(self, sequence_id: int, i: int, start: int, end: int) -> list[mx.array]:
        """See Rows._read."""
        if i not in self.layers:
            return super()._read(sequence_id, i, start, end)
        layer, slot, prefix = self.layers[i], self.slots[sequence_id], self.prefixes[sequence_id]
        shared, n, pieces = num_shared(prefix), slot.index, []
        if prefix is not None and start < shared:
            kept = layer.prefixes[prefix.prefix_id]
            pieces.append([x[..., start : min(end, shared), :] for planes in kept for x in planes])
        if end > shared:
            where = slice(max(start - shared, 0), end - shared)
            kept = layer.slabs[slot.slab.slab_id]
            pieces.append([x[n : n + 1, :, where] for planes in kept for x in planes])
        return pieces[0] if len(pieces) == 1 else [mx.concatenate(list(ab), axis=2) for ab in zip(*pieces, strict=True)]

    def _leaf(self, sequence_id: int, i: int) -> Any:
        """See Rows._leaf."""
        alone = self.own[sequence_id][i]
        return self.joined[i].extract(self.joined_ids.index(sequence_id)) if alone is None else alone

    def _drop_unused(self) -> None:
        """Forget every slab and prefix that has no row, also a slab that a move which failed was to fill."""
        slabs = {slot.slab.slab_id for slot in self.slots.values()}
        prefixes = {prefix.prefix_id for prefix in self.prefixes.values() if prefix is not None}
        for layer in self.layers.values():
            for slab_id in layer.slabs.keys() - slabs:
                del layer.slabs[slab_id]
            for prefix_id in layer.prefixes.keys() - prefixes:
                del layer.prefixes[prefix_id]

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
    nested = len(leaves(caches)) > len(caches)
    model(mx.array([[0]]), cache=caches)  # to see what its keys and values look like
    mx.eval([cache.state for cache in caches])
    if rows is SlottedRows:
        hook(model)
        quantized = None if kv_bits is None else KvBits(kv_bits, group_size(leaves(caches)))
        if quantized is not None:
            try_quantized(model, quantized)
        cost = kv_cost(leaves(caches), quantized, SlottedRows, chunk_tokens)
        return SlottedRows(
            model, cost, Codec(leaves(caches), quantized, True, refusal(model, caches), nested), quantized
        )
    if kv_bits is not None:
        raise not_quantizable(f"The architecture {architecture(model)!r} reads them itself.")
    cost = kv_cost(leaves(caches), None, rows, chunk_tokens)
    return rows(model, cost, Codec(leaves(caches), None, False, refusal(model, caches), nested))


def way(model: Any, kinds: set[type]) -> type[Rows]:
    """How the rows of a model with these kinds of caches go through it."""
    files = {module.__name__.rpartition(".")[2] for module in code(model) if hasattr(module, "Model")}
    if stretched(model) or files & ALONE:
        return SoloRows
    if files <= ALLOWED and kinds <= {KVCache, RotatingKVCache, ArraysCache}:
        return SlottedRows
    return PaddedRows if all(hasattr(kind, "merge") for kind in kinds) else SoloRows


def stretched(model: Any) -> bool:
    """Whether its frequencies go by the length of the one sequence that it takes."""
    return any(type(module).__name__ == "DynamicNTKScalingRoPE" for module in model.modules())


def refusal(model: Any, caches: list[Any]) -> str:
    """Why keys and values of this model cannot be reused, empty if they can; uses up the caches, computes nothing."""
    others = {type(leaf).__name__ for leaf in leaves(caches)} - {"KVCache", "RotatingKVCache", "ArraysCache"}
    if others:
        return f"Its layers keep what cannot be cut ({', '.join(sorted(others))})."
    if stretched(model):
        return "Its keys depend on how long the prompt is."
    states: list[Any] = [leaf for leaf in leaves(caches) if type(leaf) is ArraysCache]
    before = [[x.shape for x in leaf.cache] for leaf in states]
    model(mx.array([[0, 0]]), cache=caches)
    if [[x.shape for x in leaf.cache] for leaf in states] != before:
        return "Its states grow."
    return ""


def in_reach() -> bool:
    """Whether numpy can write to what MLX computes with."""
    return bool(mx.default_device() == mx.cpu)


def size(chunk: Chunk) -> int:
    """How many tokens it is."""
    return chunk.end - chunk.start


def halves(planes: list[mx.array]) -> tuple[Planes, Planes]:
    """A layer's planes: those of its keys, and those of its values."""
    return tuple(planes[: len(planes) // 2]), tuple(planes[len(planes) // 2 :])


def spans(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The tokens [start, end) in pieces that are laid end to end one after another."""
    return ((at, min(at + SPAN_TOKENS, end)) for at in range(start, end, SPAN_TOKENS))


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
    token_bytes, state_bytes, snapshot_bytes, windows = 0, 0, 0, []
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
            snapshot_bytes += cache.nbytes
        else:  # a model's own: it may keep as much of every token
            token_bytes += cache.nbytes
    return KvCost(token_bytes, tuple(windows), state_bytes, snapshot_bytes, padded=rows is PaddedRows)
