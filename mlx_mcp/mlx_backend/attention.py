"""Decides how keys and values are kept and attended to, under unmodified models.

mlx-lm's models hand what their cache returns to `scaled_dot_product_attention`, a name of their own module. `hook` puts
`attend` in its place, and the caches here decide the rest: the linear layers run over the whole batch, attention over
each row's own keys and values, none of them padded to the longest row's length. Three kinds of layers:

    FULL    keeps every token: slots in slabs, one attention call per run of neighbouring slots; the first tokens of
            rows that share them lie there once, and are attended to by one product for all of these rows
    WINDOW  keeps the last tokens in a ring: each row's own ring, one call per row
    STATE   keeps a recurrent state: the rows' states in one tensor

Engine thread only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, groupby
from math import e, log2
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models.cache import ArraysCache, create_attention_mask

from mlx_mcp.core.slots import SharedPrefix, Slab, Slot
from mlx_mcp.mlx_backend.blas import openblas_in_front
from mlx_mcp.mlx_backend.chunk_attention import BAR, chunk_attention

# On x86 CPUs mlx takes exp of one number at a time, and that is most of what attention takes. Where OpenBLAS rounds
# differently in batches of each size anyway, attention to more scores than FEW goes by `power` instead; of a chunk, by
# numpy's exp.
FEW = 10_000
# Scores in one tensor: a dozen such fit in a CPU's caches and in the 32 MB of freed memory that mlx keeps on CPUs, and
# to have the system map more anew takes four times as long as to compute it.
PIECE = 1 << 18
LOG2E = log2(e)
ROUND = 1.5 * 2**23  # added to a float32 of less than 2**22, it leaves the nearest whole number in the last bits
# Minimax of 2**x over [-1/2, 1/2] but for the first, which is 1, last first: within 1e-7, rounded within 2e-7.
TERMS = (0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653)


@dataclass(frozen=True)
class KvBits:
    """How FULL layers store keys and values: groups of `group_size` numbers in `bits` bits each."""

    bits: int
    group_size: int


class Keeper(Protocol):
    """A cache that attends to what it keeps."""

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """Attention of queries [rows, heads, tokens, head_dim] over each row's own keys and values."""


class Kept:
    """What the caches here return in place of keys and of values.

    A model can hand it to attention, in this layer or in another that shares its keys and values, and to nothing else:
    one that looks into its keys fails at once, where the latest token's alone would give it wrong answers.
    """

    def __init__(self, keeper: Keeper, dtype: mx.Dtype) -> None:
        self.keeper = keeper  # which must not point back: a cycle would keep tensors until the garbage is collected
        self.dtype = dtype  # some models bring what comes out of attention to the type of their values


def attend(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """What the models call in place of mlx-lm's function of the same arguments."""
    if isinstance(keys, Kept):
        return keys.keeper.attend(queries, scale, mask, sinks)
    out: mx.array = original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    return out


async_eval: Any = mx.async_eval  # which has no types
original: Any = base.scaled_dot_product_attention
quantized: Any = base.quantized_scaled_dot_product_attention
quantized_matmul: Any = mx.quantized_matmul  # whose types take no planes unpacked


def code(model: Any) -> set[ModuleType]:
    """The Python modules that the model's layers are written in, those that they inherit from included."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    return {sys.modules[cls.__module__] for cls in classes}


def hook(model: Any) -> None:
    """Put `attend` in the place of mlx-lm's function throughout the model's code."""
    for module in code(model):
        if getattr(module, "scaled_dot_product_attention", None) is original:
            module.scaled_dot_product_attention = attend  # type: ignore[attr-defined]


def by_power(num_scores: int, dtype: mx.Dtype) -> bool:
    """Whether attention of so many scores goes by `power`."""
    return num_scores > FEW and dtype == mx.float32 and mx.default_device() == mx.cpu and openblas_in_front()


def power(x: mx.array) -> mx.array:
    """2**x for x <= 0: within 2e-7 of it, from -127 down exactly 0, NaN of NaN.

    Reduced to the nearest whole number and a polynomial of what is left (Cody and Waite, Software Manual for the
    Elementary Functions, 1980); the whole number is added to the bits that are the exponent (Schraudolph, A Fast,
    Compact Approximation of the Exponential Function, 1999).
    """
    x = mx.maximum(x, -127.0)  # where the polynomial is 1, and its exponent 127 is taken to that of 0
    rounded = x + ROUND
    rest = x - (rounded - ROUND)
    p = rest * TERMS[0]
    for term in TERMS[1:]:
        p = (p + term) * rest
    return ((p + 1.0).view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32)


def largest(scores: mx.array) -> mx.array:
    """The maximum over the last axis, which is kept; NaN where one is."""
    while scores.shape[-1] > 512:  # mlx's own is slower than halves against each other
        half = (scores.shape[-1] + 1) // 2
        scores = mx.maximum(scores[..., :half], scores[..., -half:])
    return scores.max(axis=-1, keepdims=True)


def weigh(scores: list[mx.array], sinks: mx.array | None) -> tuple[list[mx.array], mx.array]:
    """Softmax to the base of 2 over parts of [..., tokens] each; returns each part's weights, and what to divide by.

    sinks: as in `softmax`, broadcast to [..., 1]. A row with a NaN or +inf among its scores is NaN, and no other is.
    """
    top = reduce(mx.maximum, [largest(part) for part in scores] + ([] if sinks is None else [sinks]))
    weights = [power(part - top) for part in scores]
    total = top - top if sinks is None else power(sinks - top)  # not 0: it must be NaN where the largest is no number
    for part in weights:
        total = mx.addmm(total, part, mx.ones((part.shape[-1], 1)))  # faster than mx.sum
    return weights, total


def bars(mask: mx.array) -> mx.array:
    """What to add to scores for a bool mask; mx.where takes longer than all of `power`."""
    return (mask.astype(mx.float32) - 1.0) * BAR


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of one query per row over its keys and values.

    queries: [rows, heads, 1, head_dim]; keys, values: [rows, kv_heads, tokens, width]; mask: bool, broadcast over
    [rows, kv_heads, heads per kv_head, tokens]; result: [rows, heads, 1, width].

    On a CPU mlx's own reads the keys once for each query head; folding the heads that share keys into one product is
    1.3 to 1.5 times as fast (docs/log.md).
    """
    rows, heads, _, width = queries.shape
    if by_power(rows * heads * keys.shape[2], queries.dtype):
        return power_attention(queries, keys, values, scale, mask, sinks)
    if sinks is not None or mx.default_device() != mx.cpu:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    shared = keys.shape[1]
    scores = (queries * scale).reshape(rows, shared, heads // shared, width) @ keys.swapaxes(-1, -2)
    (weights,), _ = softmax([scores], [mask], None, False)
    return (weights @ values).reshape(rows, heads, 1, values.shape[-1])


def power_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | None,
    sinks: mx.array | None,
) -> mx.array:
    """What `attention` does, by `power`: a few rows at a time, one after another."""
    rows, heads, _, width = queries.shape
    shared, tokens = keys.shape[1:3]
    if rows > max(1, PIECE // (heads * tokens)):
        outs: list[mx.array] = []
        for half in (slice(rows // 2), slice(rows // 2, rows)):
            (q,) = mx.depends([queries[half]], outs) if outs else [queries[half]]
            of = None if mask is None else mask[half]
            outs.append(power_attention(q, keys[half], values[half], scale, of, sinks))
        return mx.concatenate(outs)
    q = (queries * (scale * LOG2E)).reshape(rows, shared, heads // shared, width)
    # Keys times queries: OpenBLAS would copy all keys to have them the other way round.
    scores = mx.contiguous((keys @ q.swapaxes(-1, -2)).swapaxes(-1, -2))
    (weights,), total = softmax([scores], [mask], sinks, True)
    return (weights @ values / total).reshape(rows, heads, 1, values.shape[-1])


def softmax(
    scores: list[mx.array], masks: list[mx.array | None], sinks: mx.array | None, fast: bool
) -> tuple[list[mx.array], mx.array]:
    """The weights for scores [rows, kv_heads, heads per kv_head, tokens] in parts, and what to divide them by.

    A head's sink [heads] is one more score, ahead of the tokens' as in mx.fast, that takes weight and has no value.
    Scores for `fast`, which is by `power`, are times LOG2E.
    """
    kv_heads, each = scores[0].shape[1:3]
    sink = None if sinks is None else sinks.reshape(1, kv_heads, each, 1)
    if fast:
        barred = [part if mask is None else part + bars(mask) for part, mask in zip(scores, masks, strict=True)]
        return weigh(barred, None if sink is None else sink * LOG2E)
    barred = [part if mask is None else mx.where(mask, part, -mx.inf) for part, mask in zip(scores, masks, strict=True)]
    if sink is not None:
        barred.insert(0, mx.broadcast_to(sink, (len(scores[0]), kv_heads, each, 1)))
    weights = mx.softmax(mx.concatenate(barred, axis=-1), axis=-1, precise=True)
    ends: Any = list(accumulate(part.shape[-1] for part in barred))
    parts = list(mx.split(weights, ends[:-1], axis=-1))
    return parts if sink is None else parts[1:], mx.array(1.0, weights.dtype)


def begun(out: mx.array) -> mx.array:
    """A layer's attention, of which computing begins while Python is at the layers after it."""
    async_eval(out)
    return out


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of the batch, n of them, that lie in neighbouring slots of one slab and share their prefix.

    Each row's tokens, in the order in which it attends to them; `tokens` in all:

        [0 ... prefix.num_tokens) once for all rows   [prefix.num_tokens ... tokens) in its slot, from 0
    """

    slab: Slab
    prefix: SharedPrefix | None
    rows: slice  # where they are in the batch
    where: slice  # where they are in the slab
    longest: int  # tokens of a slot to attend to, this step's included
    slots: mx.array  # [n]
    positions: mx.array  # [n]: where in its slot each row's token of this step goes
    mask: mx.array | None  # [n, 1, 1, longest]: each row's own tokens in its slot; None where all are as long

    def masks(self, window: int | None) -> list[mx.array | None]:
        """Each row's own last `window` tokens, [n, 1, 1, …]: of its prefix, if it has one, and of its slot."""
        shared = num_shared(self.prefix)
        if window is None:
            return [None, self.mask] if shared else [self.mask]
        tokens, last = mx.arange(-shared, self.longest), self.positions[:, None]
        mask = ((tokens <= last) & (tokens > last - window))[:, None, None]
        return [mask[..., :shared], mask[..., shared:]] if shared else [mask]


@dataclass(frozen=True)
class Plan:
    """Where a batch's rows are; made once a step, and used by every FULL layer."""

    runs: list[Run]
    groups: dict[SharedPrefix | None, list[Run]]  # the runs by prefix
    offsets: mx.array  # [rows]: the position of each row's token


def num_shared(prefix: SharedPrefix | None) -> int:
    """Tokens of a row that are not in its slot."""
    return 0 if prefix is None else prefix.num_tokens


def plan(rows: list[tuple[Slot, int, SharedPrefix | None]]) -> Plan:
    """The plan for rows of slot, length (its prefix included) and prefix; they must come in order of slab and slot."""
    runs: list[Run] = []
    groups: dict[SharedPrefix | None, list[Run]] = {}
    for (slab, _, prefix), group in groupby(
        enumerate(rows), lambda pair: (pair[1][0].slab, pair[1][0].index - pair[0], pair[1][2])
    ):
        members = list(group)
        row, (slot, _, _) = members[0]
        n, lengths = len(members), [length - num_shared(prefix) for _, (_, length, _) in members]
        positions, longest = mx.array(lengths), max(lengths) + 1
        mask = None
        if min(lengths) + 1 < longest:
            mask = (mx.arange(longest) <= positions[:, None])[:, None, None]
        where = slice(slot.index, slot.index + n)
        slots = mx.arange(where.start, where.stop)
        runs.append(Run(slab, prefix, slice(row, row + n), where, longest, slots, positions, mask))
        groups.setdefault(prefix, []).append(runs[-1])
    return Plan(runs, groups, mx.array([length for _, length, _ in rows]))


Planes = tuple[mx.array, ...]  # what a tensor is stored as: itself, or quantized values, scales and biases


class FullLayer:
    """The keys and values of one FULL layer, in planes.

    For each slab of [slots, kv_heads, capacity, width]; for each shared prefix of [1, kv_heads, num_tokens, width].
    """

    def __init__(self, kv_bits: KvBits | None) -> None:
        self.kv_bits = kv_bits
        self.slabs: dict[int, tuple[list[mx.array], list[mx.array]]] = {}
        self.prefixes: dict[int, tuple[list[mx.array], list[mx.array]]] = {}

    @property
    def nbytes(self) -> int:
        """What all slabs and prefixes take."""
        pairs = [*self.slabs.values(), *self.prefixes.values()]
        return sum(plane.nbytes for pair in pairs for planes in pair for plane in planes)

    def encode(self, x: mx.array) -> Planes:
        """How `x` [..., head_dim] is stored."""
        if self.kv_bits is None:
            return (x,)
        return tuple(mx.quantize(x, group_size=self.kv_bits.group_size, bits=self.kv_bits.bits))

    def planes(self, slab: Slab, like: tuple[Planes, Planes]) -> tuple[list[mx.array], list[mx.array]]:
        """The slab's keys and values, all zero if it is new."""
        if slab.slab_id not in self.slabs:
            keys, values = (
                [mx.zeros((slab.num_slots, p.shape[1], slab.capacity, p.shape[3]), p.dtype) for p in planes]
                for planes in like
            )
            self.slabs[slab.slab_id] = keys, values
        return self.slabs[slab.slab_id]

    def write(self, slot: Slot, at: int, keys: Planes, values: Planes) -> None:
        """Put tokens, planes of [1, kv_heads, tokens, width], into a slot from position `at` on."""
        end = at + keys[0].shape[2]
        for planes, some in zip(self.planes(slot.slab, (keys, values)), (keys, values), strict=True):
            for plane, x in zip(planes, some, strict=True):
                plane[slot.index : slot.index + 1, :, at:end] = x

    def copy(self, old: Slot, new: Slot, length: int) -> None:
        """Copy the first `length` tokens in a slot to another slot."""
        source = self.slabs[old.slab.slab_id]
        target = self.planes(new.slab, (tuple(source[0]), tuple(source[1])))
        for to, planes in zip(target, source, strict=True):
            for i, plane in enumerate(planes):
                to[i][new.index : new.index + 1, :, :length] = plane[old.index : old.index + 1, :, :length]

    def scrub(self, slot: Slot, start: int = 0) -> None:
        """Zero a slot from `start` on: a weight of nothing on no number, left there by a broken row, is none itself."""
        for planes in self.slabs.get(slot.slab.slab_id, ()):
            for plane in planes:
                plane[slot.index : slot.index + 1, :, start:] = mx.zeros((), plane.dtype)


class RowCache:
    """One row of a FULL layer while a chunk of its prompt is computed."""

    def __init__(self, layer: FullLayer, slot: Slot, length: int, prefix: SharedPrefix | None = None) -> None:
        assert length >= num_shared(prefix), f"{length} tokens of a row whose prefix has {num_shared(prefix)}"
        self.layer, self.slot, self.offset, self.prefix = layer, slot, length, prefix
        if layer.kv_bits is not None:  # what mlx-lm's attention looks for
            self.bits, self.group_size = layer.kv_bits.bits, layer.kv_bits.group_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Kept, Kept]:
        """Append keys and values [1, kv_heads, tokens, head_dim]."""
        self.append(keys, values)
        return self.fetch()

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Put keys and values after those there are."""
        start = self.offset - num_shared(self.prefix)
        self.layer.write(self.slot, start, self.layer.encode(keys), self.layer.encode(values))
        self.offset += keys.shape[2]
        self.dtype = values.dtype

    def fetch(self) -> tuple[Kept, Kept]:
        """Take what is there to be attended to; nothing may be written to the slab before that is computed."""
        end, i = self.offset - num_shared(self.prefix), self.slot.index
        kept = self.layer.slabs[self.slot.slab.slab_id]
        whole: list[Any] = [tuple(plane[i : i + 1, :, :end] for plane in planes) for planes in kept]
        self.own, self.shared = (whole[0][0], whole[1][0]), None
        if self.prefix is not None:  # a copy, where it is read, for as long as this layer takes
            first = self.layer.prefixes[self.prefix.prefix_id]
            self.shared = first[0][0], first[1][0]
            both = zip(first, whole, strict=True)
            whole = [tuple(mx.concatenate(list(p), axis=2) for p in zip(*planes, strict=True)) for planes in both]
        self.keys, self.values = whole if self.layer.kv_bits else [planes[0] for planes in whole]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Kept, Kept]:
        """What was returned last, for layers that share it."""
        kept = Kept(self, self.dtype)
        return kept, kept

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """What mlx-lm's caches make; the argument's name is theirs."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """See Keeper.attend."""
        if self.goes_by_power(queries) and (
            mask is None or isinstance(mask, str) or (mask.ndim == 2 and mask.dtype == mx.bool_)
        ):
            if queries.shape[2] == 1 and self.shared is None and mask is None:
                return begun(power_attention(queries, *self.own, scale, None, sinks))
            assert not isinstance(mask, str) or mask == "causal", f"a mask of {mask}"
            if isinstance(mask, mx.array):
                mask = mask[None]
            return chunk_attention(queries, self.shared, self.own, mask, scale, sinks)
        # [:], since mlx-lm's quantized attention changes its queries, and a layer may attend twice with the same.
        out: mx.array = original(queries[:], self.keys, self.values, self, scale, mask, sinks)
        return out

    def goes_by_power(self, queries: mx.array) -> bool:
        """Whether attention of a chunk's queries, or of as many, goes by `power`."""
        num_scores = queries.shape[1] * queries.shape[2] * self.offset
        return self.layer.kv_bits is None and by_power(num_scores, queries.dtype)


class ChunksCache:
    """Chunks of several rows in one FULL layer, as long as the longest of them; what is after a shorter one is nothing.

    The linear layers run over all of them, and read the model's weights once; each row attends to its own.
    """

    def __init__(self, rows: list[RowCache], sizes: list[int]) -> None:
        self.rows, self.sizes = rows, sizes
        self.offset = mx.array([row.offset for row in rows])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Kept, Kept]:
        """Append keys and values [rows, kv_heads, longest, head_dim], of each row as many as its chunk has."""
        for i, (row, size) in enumerate(zip(self.rows, self.sizes, strict=True)):
            row.append(keys[i : i + 1, :, :size], values[i : i + 1, :, :size])
        self.dtype = values.dtype
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Kept, Kept]:
        """What was returned last, for layers that share it."""
        kept = Kept(self, self.dtype)
        return kept, kept

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The rows' masks, which go through the model to `attend`."""
        assert max(self.sizes) == N, f"chunks of {self.sizes} tokens in a pass of {N}"
        return [row.make_mask(size, return_array, window_size) for row, size in zip(self.rows, self.sizes, strict=True)]

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """See Keeper.attend."""
        assert isinstance(mask, list), "the model made a mask of its own"
        first = self.rows[0]
        plain = sinks is None and all(own is None or isinstance(own, str) for own in mask)
        together = {(row.prefix, row.slot.slab) for row in self.rows} == {(first.prefix, first.slot.slab)}
        if plain and together and first.prefix is not None and first.goes_by_power(queries):
            return self._over(first.prefix, queries, scale)
        for row in self.rows:  # after all was written: rows of one slab would else copy it, one for another
            row.fetch()
        longest, outs = queries.shape[2], []
        for i, (row, size, own) in enumerate(zip(self.rows, self.sizes, mask, strict=True)):
            out = row.attend(queries[i : i + 1, :, :size], scale, own, sinks)
            outs.append(out if size == longest else mx.pad(out, [(0, 0), (0, 0), (0, longest - size), (0, 0)]))
        return mx.concatenate(outs)

    def _over(self, prefix: SharedPrefix, queries: mx.array, scale: float) -> mx.array:
        """Attention of all rows over their prefix, and of each over its slot."""
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


class SlotsCache:
    """The rows of a batch in one FULL layer, one token each."""

    def __init__(self, layer: FullLayer, where: Plan) -> None:
        self.layer, self.plan, self.offset = layer, where, where.offsets

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Kept, Kept]:
        """Append keys and values [rows, kv_heads, 1, head_dim], each at its row's own position."""
        new = self.layer.encode(keys), self.layer.encode(values)
        for run in self.plan.runs:
            kept = self.layer.planes(run.slab, new)
            for planes, some in zip(kept, new, strict=True):
                for plane, x in zip(planes, some, strict=True):
                    if run.mask is None:  # one position for all: no scatter
                        plane[run.where, :, run.longest - 1 : run.longest] = x[run.rows]
                    else:
                        plane[run.slots, :, run.positions] = x[run.rows, :, 0]
        self.dtype = values.dtype
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Kept, Kept]:
        """What was returned last, for layers that share it."""
        kept = Kept(self, self.dtype)
        return kept, kept

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> int | None:
        """The window, which goes through the model to `attend`; each run has its own mask."""
        assert N == 1, f"{N} tokens in a step of one token each"
        return window_size

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """See Keeper.attend."""
        assert mask is None or isinstance(mask, int), "the model made a mask of its own"
        outs: dict[int, mx.array] = {}  # by each run's first row
        for prefix, runs in self.plan.groups.items():
            if prefix is None:
                some = [self._alone(run, queries, scale, mask, sinks) for run in runs]
            else:
                some = self._shared(prefix, runs, queries, scale, mask, sinks)
            outs |= zip((run.rows.start for run in runs), some, strict=True)
        in_order = [outs[run.rows.start] for run in self.plan.runs]
        return in_order[0] if len(in_order) == 1 else mx.concatenate(in_order)

    def _own(self, run: Run) -> list[list[mx.array]]:
        """Key and value planes [n, kv_heads, longest, width] of a run's slots."""
        return [[p[run.where, :, : run.longest] for p in planes] for planes in self.layer.slabs[run.slab.slab_id]]

    def _alone(self, run: Run, queries: mx.array, scale: float, window: int | None, sinks: mx.array | None) -> mx.array:
        """Attention of a run's queries, out of those of the batch, over what its slots hold."""
        keys, values = self._own(run)
        q = queries if len(self.plan.runs) == 1 else queries[run.rows]
        (mask,) = run.masks(window)
        if self.layer.kv_bits is None:
            return attention(q, keys[0], values[0], scale, mask, sinks)
        assert sinks is None, "mlx-lm has no quantized attention with sinks"
        bits, size = self.layer.kv_bits.bits, self.layer.kv_bits.group_size
        out: mx.array = quantized(q[:], tuple(keys), tuple(values), scale, mask, size, bits)
        return out

    def _shared(
        self,
        prefix: SharedPrefix,
        runs: list[Run],
        queries: mx.array,
        scale: float,
        window: int | None,
        sinks: mx.array | None,
    ) -> list[mx.array]:
        """Each run's attention, as in `_alone`, over the prefix of all of them and what its own slots hold.

        The prefix is read once, in one product for all rows and heads that share it, and never copied. On a BLAS that
        adds up in order of the tokens, as the wheel's does, the result is bitwise what it is without sharing; on
        others, or where values are quantized, within 1e-6 of it in float32.
        """
        first_keys, first_values = self.layer.prefixes[prefix.prefix_id]
        own = [self._own(run) for run in runs]
        heads, kv_heads = queries.shape[1], first_keys[0].shape[1]
        tokens = sum((run.rows.stop - run.rows.start) * (prefix.num_tokens + run.longest) for run in runs)
        fast = by_power(heads * tokens // len(runs), queries.dtype)
        scaled = queries * (scale * LOG2E if fast else scale)
        grouped = [scaled[run.rows].reshape(-1, kv_heads, heads // kv_heads, scaled.shape[-1]) for run in runs]
        weights, totals = [], []
        for run, q, first, (keys, _) in zip(runs, grouped, self._folded(grouped, first_keys, True), own, strict=True):
            scores = [first, self._product(q, keys, True)]
            parts, total = softmax(scores, run.masks(window), sinks, fast)
            weights.append(parts)
            totals.append(total)
        outs = []
        of_first = self._folded([first for first, _ in weights], first_values, False)
        for (_, w), total, out, (_, values) in zip(weights, totals, of_first, own, strict=True):
            # addmm goes on adding up where the prefix ended
            plain = self.layer.kv_bits is None
            out = mx.addmm(out, w, values[0]) if plain else out + self._product(w, values, False)
            outs.append((out / total).reshape(out.shape[0], heads, 1, out.shape[-1]))
        return outs

    def _folded(self, parts: list[mx.array], planes: list[mx.array], transpose: bool) -> list[mx.array]:
        """The product of each [n, kv_heads, heads per kv_head, …] with planes of [1, kv_heads, …], all in one."""
        x = mx.concatenate(parts).swapaxes(0, 1)
        kv_heads, rows, each, _ = x.shape
        out = self._product(x.reshape(1, kv_heads, rows * each, -1), planes, transpose)
        ends: Any = list(accumulate(len(part) for part in parts))
        return list(mx.split(out.reshape(kv_heads, rows, each, -1).swapaxes(0, 1), ends[:-1]))

    def _product(self, x: mx.array, planes: list[mx.array], transpose: bool) -> mx.array:
        """`x` times what the planes hold or, transposed, its last two axes swapped."""
        if self.layer.kv_bits is None:
            return x @ (planes[0].swapaxes(-1, -2) if transpose else planes[0])
        bits, size = self.layer.kv_bits.bits, self.layer.kv_bits.group_size
        out: mx.array = quantized_matmul(x, *planes, transpose=transpose, group_size=size, bits=bits)
        return out


class RingsCache:
    """The rows of a batch in one WINDOW layer, one token each; every row keeps its own ring."""

    def __init__(self, rings: list[Any]) -> None:  # RotatingKVCache, which has no types
        self.rings = rings
        self.offset = mx.array([ring.offset for ring in rings])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Kept, Kept]:
        """Append keys and values [rows, kv_heads, 1, head_dim]."""
        self.whole = [ring.update_and_fetch(keys[i : i + 1], values[i : i + 1]) for i, ring in enumerate(self.rings)]
        self.dtype = values.dtype
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Kept, Kept]:
        """What was returned last, for layers that share it."""
        kept = Kept(self, self.dtype)
        return kept, kept

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> None:
        """None: a ring holds no more than its window."""
        assert N == 1, f"{N} tokens in a step of one token each"
        assert window_size is None or window_size >= self.rings[0].max_size, "a window smaller than its ring"

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """See Keeper.attend."""
        assert mask is None, "the model made a mask of its own"
        outs = [
            attention(queries[i : i + 1], keys, values, scale, None, sinks)
            for i, (keys, values) in enumerate(self.whole)
        ]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)


def join_states(rows: list[Any]) -> Any:
    """The rows' recurrent states, each an ArraysCache of [1, …], in one of [rows, …]."""
    joined = ArraysCache(len(rows[0].cache))
    for i, parts in enumerate(zip(*(row.cache for row in rows), strict=True)):
        joined[i] = mx.concatenate(list(parts))
    return joined
