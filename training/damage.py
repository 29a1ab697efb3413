"""Ways to damage a key-value cache, as a broken block cache or restore would.

Each takes the layers of a dialog's cache, and those of a foreign dialog of the same length, and returns damaged layers;
the originals stay as they are. A block is 64 tokens. What each does to the embedded model's answers is the damage table
of training/README.md: it says which faults of a cache the model can see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

BLOCK = 64


@dataclass(frozen=True)
class Scene:
    """What a damage may need: the cache, another dialog's, and the block that holds what will be asked."""

    layers: list[KVCache]
    foreign: list[KVCache]
    target: int  # the block that holds the answer
    other: int  # another block


def layer(keys: mx.array, values: mx.array) -> KVCache:
    """A cache layer that holds these keys and values: [1, heads, tokens, head_dim]."""
    made: Any = KVCache()
    made.keys, made.values, made.offset = mx.contiguous(keys), mx.contiguous(values), keys.shape[2]
    return made


def parts(cache: Any) -> tuple[mx.array, mx.array]:
    """The layer's keys and values, without the room it keeps for more."""
    return cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :]


def copied(layers: list[KVCache]) -> list[KVCache]:
    """The same cache again, sharing nothing that is written to."""
    return [layer(*parts(c)) for c in layers]


def span(block: int) -> tuple[int, int]:
    """The block's tokens [start, end)."""
    return block * BLOCK, (block + 1) * BLOCK


def replaced(x: mx.array, start: int, new: mx.array) -> mx.array:
    """`x` with its tokens from `start` on replaced by `new`."""
    return mx.concatenate([x[..., :start, :], new, x[..., start + new.shape[2] :, :]], axis=2)


def foreign_block(scene: Scene) -> list[KVCache]:
    """Another dialog's block over the target: a hash collision, or a lost owner check."""
    start, end = span(scene.target)
    made = []
    for own, foreign in zip(scene.layers, scene.foreign, strict=True):
        pairs = zip(parts(own), parts(foreign), strict=True)
        made.append(layer(*(replaced(x, start, y[..., start:end, :]) for x, y in pairs)))
    return made


def without(scene: Scene, block: int) -> list[KVCache]:
    """The cache with a block left out, and everything after it moved up."""
    start, end = span(block)
    return [
        layer(*(mx.concatenate([x[..., :start, :], x[..., end:, :]], axis=2) for x in parts(c))) for c in scene.layers
    ]


def zeroed(scene: Scene) -> list[KVCache]:
    """The target block never written."""
    start, end = span(scene.target)
    return [layer(*(replaced(x, start, mx.zeros_like(x[..., start:end, :])) for x in parts(c))) for c in scene.layers]


def values_swapped(scene: Scene) -> list[KVCache]:
    """The values of two blocks exchanged, their keys not."""
    a, b = span(scene.target), span(scene.other)
    made = []
    for c in scene.layers:
        keys, values = parts(c)
        first, second = values[..., a[0] : a[1], :], values[..., b[0] : b[1], :]
        made.append(layer(keys, replaced(replaced(values, a[0], second), b[0], first)))
    return made


def slots_swapped(scene: Scene) -> list[KVCache]:
    """Keys and values of two blocks exchanged whole: no damage, since keys carry their positions."""
    a, b = span(scene.target), span(scene.other)
    made = []
    for c in scene.layers:
        swapped = []
        for x in parts(c):
            first, second = x[..., a[0] : a[1], :], x[..., b[0] : b[1], :]
            swapped.append(replaced(replaced(x, a[0], second), b[0], first))
        made.append(layer(*swapped))
    return made


def values_shifted(scene: Scene) -> list[KVCache]:
    """Every value one slot late."""
    made = []
    for c in scene.layers:
        keys, values = parts(c)
        made.append(layer(keys, mx.concatenate([values[..., :1, :], values[..., :-1, :]], axis=2)))
    return made


def heads_swapped(scene: Scene) -> list[KVCache]:
    """The key-value heads in the wrong order."""
    return [layer(*(x[:, ::-1] for x in parts(c))) for c in scene.layers]


def stale_tail(scene: Scene) -> list[KVCache]:
    """A cancelled generation's tokens left at the end: here 16 of another dialog."""
    made = []
    for own, foreign in zip(scene.layers, scene.foreign, strict=True):
        pairs = zip(parts(own), parts(foreign), strict=True)
        made.append(layer(*(mx.concatenate([x, y[..., -16:, :]], axis=2) for x, y in pairs)))
    return made


def last_lost(scene: Scene) -> list[KVCache]:
    """The last token's keys and values missing."""
    return [layer(*(x[..., :-1, :] for x in parts(c))) for c in scene.layers]


def last_doubled(scene: Scene) -> list[KVCache]:
    """The last token's keys and values twice."""
    return [layer(*(mx.concatenate([x, x[..., -1:, :]], axis=2) for x in parts(c))) for c in scene.layers]


def foreign_layer(scene: Scene) -> list[KVCache]:
    """The third of the layers from another dialog."""
    return [layer(*parts(f if i == 2 else c)) for i, (c, f) in enumerate(zip(scene.layers, scene.foreign, strict=True))]


class ShiftedCache(KVCache):
    """A cache that tells the model a wrong position for what comes next."""

    def __init__(self, cache: KVCache, by: int) -> None:
        self._cache, self._by = cache, by

    @property
    def offset(self) -> int:  # type: ignore[override]
        """The position that the next token is rotated to."""
        return int(self._cache.offset) + self._by

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append to the true end."""
        return self._cache.update_and_fetch(keys, values)

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The true length's mask."""
        return self._cache.make_mask(*args, **kwargs)

    @property
    def state(self) -> Any:
        """What `mx.eval` needs."""
        return self._cache.state


def shifted(by: int) -> Callable[[Scene], list[KVCache]]:
    """Positions off by a number of tokens."""
    return lambda scene: [ShiftedCache(c, by) for c in copied(scene.layers)]


def quantized(bits: int) -> Callable[[Scene], list[Any]]:
    """The cache in fewer bits: a change that is meant, and should do no harm."""
    return lambda scene: [c.to_quantized(group_size=64, bits=bits) for c in copied(scene.layers)]


HARMLESS: dict[str, Callable[[Scene], list[Any]]] = {
    "none": lambda scene: copied(scene.layers),
    "two K+V blocks swapped whole": slots_swapped,
    "KV 8-bit": quantized(8),
    "KV 4-bit": quantized(4),
}
DAMAGES: dict[str, Callable[[Scene], list[Any]]] = {
    "another dialog's cache": lambda scene: copied(scene.foreign),
    "foreign block over the target": foreign_block,
    "target block dropped": lambda scene: without(scene, scene.target),
    "target block zeroed": zeroed,
    "another block dropped": lambda scene: without(scene, scene.other),
    "V of two blocks swapped": values_swapped,
    "V shifted one slot": values_shifted,
    "kv heads swapped": heads_swapped,
    "stale tail of 16 tokens": stale_tail,
    "last token lost": last_lost,
    "last token doubled": last_doubled,
    "offset +1": shifted(1),
    "offset -1": shifted(-1),
    "offset +2": shifted(2),
    "offset +32": shifted(32),
    "layer 2 from another dialog": foreign_layer,
    "KV 2-bit": quantized(2),
}
