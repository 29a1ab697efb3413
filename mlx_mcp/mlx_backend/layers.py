"""Cuts tokens out of a row's layers into payloads, and joins payloads again. Knows no rows.

    FULL    KVCache          every token
    WINDOW  RotatingKVCache  the last tokens that its ring would keep, as far as it still has them
    STATE   ArraysCache      the whole state as it was after the last token, nothing of each token

A payload has one array for the planes of one shape of all layers of a kind, in this order, one after another: Metal
gives a process 499,000 buffers and no more. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlx_mcp.core.layout import CacheKind, Form, LayerCache, Layout, Part, Tensor
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.slabs import FullLayer, KvBits

async_eval: Any = mx.async_eval  # which has no types
DTYPES = {  # by the names that safetensors files have for them
    **{
        f"{kind[0].upper()}{bits}": getattr(mx, f"{kind}{bits}") for kind in ("uint", "int") for bits in (8, 16, 32, 64)
    },
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
QUANTIZED = ("", ".scales", ".biases")  # what mx.quantize makes of keys, and of values


@dataclass(frozen=True, eq=False)
class KvPayload:
    """See core.layout.Payload. Its arrays share memory with nothing else, and may still be being computed."""

    codec: Codec  # of the model
    num_tokens: int
    window_start: int
    has_state: bool
    full: tuple[mx.array, ...]  # for each stack [planes, kv_heads, num_tokens, width]
    windows: tuple[mx.array, ...]  # the same of the last tokens
    states: tuple[mx.array, ...]  # for each stack [planes, …], or none at all

    def __eq__(self, other: object) -> bool:
        """Whether the same bits are in both, for the same tokens; waits for them."""
        if not isinstance(other, KvPayload):
            return NotImplemented
        mine, its = ((p.num_tokens, p.window_start, p.has_state, *p.pack()) for p in (self, other))
        return mine == its

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays in it."""
        return [*self.full, *self.windows, *self.states]

    @property
    def nbytes(self) -> int:
        """See core.layout.Payload."""
        return sum(array.nbytes for array in self.arrays)

    def pack(self) -> tuple[Form, tuple[memoryview, ...]]:
        """See core.layout.Payload."""
        # As bytes, since NumPy knows no bfloat16; a view of the array's own memory.
        flat = (np.array(array.view(mx.uint8), copy=False).reshape(-1) for array in self.arrays)
        data = tuple(each.data.toreadonly() for each in flat)
        return self.codec.form(tuple((NAMES[array.dtype], tuple(array.shape[1:])) for array in self.arrays)), data


Plane = tuple[str, tuple[int, ...]]  # the dtype, as files name it, and the shape of the planes of one array


@dataclass(frozen=True)
class Stack:
    """The planes that make one array of a payload."""

    window: int  # tokens that its layers keep; 0 where that is all or none
    planes: tuple[tuple[int, int], ...]  # layer, and which of its planes
    names: tuple[str, ...]  # of these planes in files
    is_state: bool
    dtype: str  # in files
    shape: tuple[int, ...]  # of each plane, of one token where it has tokens


class Codec:
    """Cuts a model's rows and restores them. A layer's planes are first those of its keys, then those of its values.

    `caches` hold one token; FULL layers store theirs as `kv_bits` says, and rows can share them where `sharing` is set.
    `refused` is why nothing is reused, `nested` whether a layer can have several of the caches.
    """

    def __init__(
        self, caches: list[Any], kv_bits: KvBits | None, sharing: bool, refused: str = "", nested: bool = False
    ) -> None:
        self.full = stacks({i: c for i, c in enumerate(caches) if type(c) is KVCache}, kv_bits)
        self.windows = stacks({i: c for i, c in enumerate(caches) if type(c) is RotatingKVCache}, None)
        self.states = stacks({i: c for i, c in enumerate(caches) if type(c) is ArraysCache}, None)
        self.layers = () if nested else tuple(layer_cache(cache, kv_bits) for cache in caches)
        self.forms: dict[tuple[Plane, ...], Form] = {}
        windows = tuple(sorted({stack.window for stack in self.windows}))
        sharing = sharing and bool(self.full)
        # Measured on CPUs (docs/log.md). Nobody has measured it on a GPU: there, a setting says it.
        rows = 2 if device.on_cpu() else 0
        self.layout = Layout(windows, bool(self.states), sharing, rows if sharing else 0)
        if refused:
            self.layout = Layout(refused=refused)

    def cut(self, read: Callable[[int], list[mx.array]], start: int, end: int, state: bool) -> KvPayload:
        """A payload of tokens [start, end), not computed yet; `read` returns the planes of a layer."""
        planes: dict[int, list[mx.array]] = {}

        def stacked(some: tuple[Stack, ...]) -> tuple[mx.array, ...]:
            planes.update({i: read(i) for stack in some for i, _ in stack.planes if i not in planes})
            return tuple(joined([planes[i][k] for i, k in stack.planes]) for stack in some)

        full, windows = stacked(self.full), stacked(self.windows)
        window_start = max((end - array.shape[2] for array in windows), default=start)
        states = stacked(self.states) if state else ()
        return KvPayload(self, end - start, window_start, len(states) == len(self.states), full, windows, states)

    def tokens(self, parts: Seq[Part], start: int, end: int) -> dict[int, list[mx.array]]:
        """Tokens [start, end) of the concatenated parts, by FULL layer."""
        payloads = [payload(part) for part in parts]
        arrays = [[p.full[n] for p in payloads] for n in range(len(self.full))]
        return by_layer(self.full, [concatenate(parts, each, start, end) for each in arrays])

    def latest(self, parts: Seq[Part], num_tokens: int) -> dict[int, list[mx.array]]:
        """The last of the first `num_tokens` tokens by WINDOW layer, and the states after them by STATE layer."""
        payloads = [payload(part) for part in parts]
        assert payloads[-1].has_state, "a row without its states"
        windows = []
        for n, stack in enumerate(self.windows):
            start = max(0, num_tokens - stack.window)
            windows.append(concatenate(parts, [p.windows[n] for p in payloads], start, num_tokens))
        return by_layer(self.windows, windows) | by_layer(self.states, payloads[-1].states)

    def form(self, planes: tuple[Plane, ...]) -> Form:
        """What the bytes of a payload are whose arrays have such planes."""
        if planes not in self.forms:
            some = [*self.full, *self.windows, *self.states]
            tensors = [
                Tensor(name, dtype, shape)
                for stack, (dtype, shape) in zip(some, planes, strict=False)  # there may be no states
                for name in stack.names
            ]
            self.forms[planes] = Form(self.layers, tuple(tensors))
        return self.forms[planes]

    def unpack(self, stored: StoredBlock) -> Callable[[], KvPayload]:
        """Turn what `KvPayload.pack` returned into a payload; see ModelRunner.unpack.

        The bytes are copied into arrays of bytes, which builds no graph, so any thread may call this. The engine thread
        calls what it returns, for the rest.
        """
        some = [*self.full, *self.windows, *(self.states if stored.has_state else ())]
        planes: list[Plane] = []
        at = 0
        for stack in some:
            planes += [(tensor.dtype, tensor.shape) for tensor in stored.form.tensors[at : at + 1]]
            at += len(stack.names)
        fits = [fit(stack, *plane) for stack, plane in zip(some, planes, strict=False)]
        if len(planes) < len(some) or not all(fits) or stored.form != self.form(tuple(planes)):
            raise ValueError("a block of another layout, or with other states")
        data = b"".join(stored.data) if len(stored.data) != 1 else stored.data[0]
        arrays, at = [], 0
        for stack, (name, shape) in zip(some, planes, strict=True):
            dtype = DTYPES[name]
            raw = (len(stack.names), *shape[:-1], shape[-1] * dtype.size)
            arrays.append((mx.array(np.frombuffer(data, np.uint8, prod(raw), at).reshape(raw)), dtype))
            at += prod(raw)
        if at != len(data):
            raise ValueError("other bytes than are described")

        def make() -> KvPayload:
            made = [raw.view(dtype) for raw, dtype in arrays]
            async_eval(made)  # a step may be under way, for which nobody waits here
            first, second = len(self.full), len(self.full) + len(self.windows)
            kinds = tuple(made[:first]), tuple(made[first:second]), tuple(made[second:])
            return KvPayload(self, len(stored.tokens), stored.window_start, stored.has_state, *kinds)

        return make


def fit(stack: Stack, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether planes of a stack may be of this dtype and shape, however many tokens there are of them."""
    if stack.is_state:
        return dtype in DTYPES and shape == stack.shape
    return dtype == stack.dtype and len(shape) == 3 and (shape[0], shape[2]) == (stack.shape[0], stack.shape[2])


def layer_cache(cache: Any, kv_bits: KvBits | None) -> LayerCache:
    """How a layer keeps its tokens, whose empty cache this would be; those of other kinds are never in a payload."""
    if type(cache) is RotatingKVCache:
        return LayerCache(CacheKind.WINDOW, cache.max_size)
    if type(cache) is ArraysCache:
        return LayerCache(CacheKind.STATE)
    return LayerCache(CacheKind.FULL, 0, *((kv_bits.group_size, kv_bits.bits) if kv_bits else (0, 0)))


def stacks(layers: dict[int, Any], kv_bits: KvBits | None) -> tuple[Stack, ...]:
    """The planes of caches that hold one token, grouped by shape and window."""
    stored, found = FullLayer(kv_bits), dict[Any, list[tuple[int, int, str]]]()
    for i, cache in layers.items():
        kind, window = type(cache), 0
        if kind is ArraysCache:
            planes = {f"state.{k}": plane for k, plane in enumerate(cache.cache)}
        else:
            named = {"keys": stored.encode(cache.keys), "values": stored.encode(cache.values)}
            planes = {
                part + of: plane
                for part, some in named.items()
                for of, plane in zip(QUANTIZED, some, strict=False)  # one plane where nothing is quantized
            }
            window = cache.max_size if kind is RotatingKVCache else 0
        for k, (part, plane) in enumerate(planes.items()):
            alike = window, kind is ArraysCache, NAMES[plane.dtype], tuple(plane.shape[1:])
            found.setdefault(alike, []).append((i, k, f"layers.{i}.{part}"))
    return tuple(
        Stack(window, tuple((i, k) for i, k, _ in places), tuple(name for *_, name in places), is_state, dtype, shape)
        for (window, is_state, dtype, shape), places in found.items()
    )


def read(cache: Any, start: int, end: int) -> list[mx.array]:
    """The planes of a row's cache: its tokens [start, end), of a ring those that it still has; or the states."""
    kind = type(cache)
    if kind is ArraysCache:
        return list(cache.cache)
    if kind is KVCache:
        return [x[..., start:end, :] for x in (cache.keys, cache.values)]
    in_order = [cache._temporal_order(x) for x in (cache.keys, cache.values)]
    first = cache.offset - in_order[0].shape[2]
    start = max(start, end - cache.max_size, first)
    return [x[..., start - first : max(start, end) - first, :] for x in in_order]


def put(cache: Any, planes: list[mx.array], num_tokens: int) -> None:
    """Fill an empty cache with planes of its latest tokens, out of `num_tokens`, or with states."""
    kind = type(cache)
    if kind is ArraysCache:
        cache.cache = planes
    else:  # a ring: with fewer than it keeps it would fail as it turns
        assert planes[0].shape[2] == min(num_tokens, cache.max_size), "a ring with a gap"
        cache.keys, cache.values = planes
        cache.offset, cache._idx = num_tokens, planes[0].shape[2]


def joined(planes: list[mx.array]) -> mx.array:
    """[planes, …], in memory of its own: of a single array, concatenate would make no copy."""
    return mx.concatenate([*planes, planes[0][:0]])


def by_layer(some: tuple[Stack, ...], arrays: Seq[mx.array]) -> dict[int, list[mx.array]]:
    """The planes [1, …] that lie in a payload's arrays, by layer."""
    found: dict[int, dict[int, mx.array]] = {}
    for stack, array in zip(some, arrays, strict=True):
        for n, (i, k) in enumerate(stack.planes):
            found.setdefault(i, {})[k] = array[n : n + 1]
    return {i: [planes[k] for k in sorted(planes)] for i, planes in found.items()}


def concatenate(parts: Seq[Part], arrays: list[mx.array], start: int, end: int) -> mx.array:
    """Tokens [start, end) of the concatenated parts; each part's array ends where its payload does."""
    pieces, at = [], 0
    for part, array in zip(parts, arrays, strict=True):
        stop = at + part.num_tokens
        if start < stop and at < end:
            first = at + payload(part).num_tokens - array.shape[2]
            pieces.append(array[:, :, max(start - first, 0) : max(min(end, stop) - first, 0)])
        at = stop
    whole = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)
    assert whole.shape[2] == end - start, f"{whole.shape[2]} tokens where {end - start} are needed"
    return whole


def payload(part: Part) -> KvPayload:
    """The payload of a part, which must have been cut by a Codec."""
    assert isinstance(part.payload, KvPayload), f"a {type(part.payload).__name__} for a row of keys and values"
    return part.payload
