"""Keeps the keys and values of layers that attend to every token: slots in slabs, and prefixes that rows share."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_mcp.core.slots import SharedPrefix, Slab, Slot

Planes = tuple[mx.array, ...]  # what a tensor is stored as: itself, or quantized values, scales and biases


@dataclass(frozen=True)
class KvBits:
    """How FULL layers store keys and values: groups of `group_size` numbers in `bits` bits each."""

    bits: int
    group_size: int


def num_shared(prefix: SharedPrefix | None) -> int:
    """The number of a row's tokens that are not in its slot."""
    return 0 if prefix is None else prefix.num_tokens


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
        """The bytes of all slabs and prefixes."""
        pairs = [*self.slabs.values(), *self.prefixes.values()]
        return sum(plane.nbytes for pair in pairs for planes in pair for plane in planes)

    def encode(self, x: mx.array) -> Planes:
        """The planes that `x` [..., head_dim] is stored as."""
        if self.kv_bits is None:
            return (x,)
        return tuple(mx.quantize(x, group_size=self.kv_bits.group_size, bits=self.kv_bits.bits))

    def planes(self, slab: Slab, like: tuple[Planes, Planes]) -> tuple[list[mx.array], list[mx.array]]:
        """The slab's keys and values, which are zero if it is new; `like` are planes of the same kinds."""
        if slab.slab_id not in self.slabs:
            keys, values = (
                [mx.zeros((slab.num_slots, p.shape[1], slab.capacity, p.shape[3]), p.dtype) for p in planes]
                for planes in like
            )
            self.slabs[slab.slab_id] = keys, values
        return self.slabs[slab.slab_id]

    def write(self, slot: Slot, at: int, keys: Planes, values: Planes) -> None:
        """Write tokens, planes of [1, kv_heads, tokens, width], to a slot from position `at` on."""
        end = at + keys[0].shape[2]
        for planes, new in zip(self.planes(slot.slab, (keys, values)), (keys, values), strict=True):
            for plane, x in zip(planes, new, strict=True):
                plane[slot.index : slot.index + 1, :, at:end] = x

    def copy(self, old: Slot, new: Slot, length: int) -> None:
        """Copy the first `length` tokens in a slot to another slot."""
        source = self.slabs[old.slab.slab_id]
        target = self.planes(new.slab, (tuple(source[0]), tuple(source[1])))
        for to, planes in zip(target, source, strict=True):
            for i, plane in enumerate(planes):
                to[i][new.index : new.index + 1, :, :length] = plane[old.index : old.index + 1, :, :length]

    def zero(self, slot: Slot, start: int = 0) -> None:
        """Zero a slot from position `start` on.

        A masked token has the weight 0, but 0 times NaN is NaN: what a broken row left there would spoil the next row.
        """
        for planes in self.slabs.get(slot.slab.slab_id, ()):
            for plane in planes:
                plane[slot.index : slot.index + 1, :, start:] = mx.zeros((), plane.dtype)
