"""Rotary positions with fewer operations: what all layers turn by is computed once in a pass.

On a CPU `mx.fast.rope` consists of 29 operations, of which 16 compute cosines and sines that are the same for queries,
keys and every layer: a sixth of all operations of a pass. The numbers are the same, bit by bit. Engine
thread only.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.nn.layers.positional_encoding import RoPE

Turn = tuple[mx.array, mx.array]  # cosines and sines, [1 or rows, 1, tokens, half of the dimensions]


class Angles:
    """What the tokens of the latest pass are turned by.

    Offsets that are numbers are compared. Of two arrays nobody can tell without waiting for them, so that only the
    array that `begin` names is known to be the same in all layers.
    """

    def __init__(self) -> None:
        self._offsets: mx.array | None = None
        self._of: tuple[Any, ...] = ()
        self._turns: dict[tuple[Any, ...], Turn] = {}

    def begin(self, offsets: mx.array | None = None) -> None:
        """A pass begins whose rows, of one token each, have these offsets; without any, the last pass is over."""
        self._offsets, self._of, self._turns = offsets, (), {}

    def turn(self, rope: RoPE, x: mx.array, offset: Any) -> Turn | None:
        """The cosines and sines for x [rows, heads, tokens, width]; None if they cannot be shared."""
        shared = offset is self._offsets and offset is not None
        if x.ndim != 4 or rope.traditional or not (shared or isinstance(offset, int)):
            return None
        of = (x.shape[2], x.dtype, None if shared else offset)
        if of != self._of:
            self._of, self._turns = of, {}
        key = rope.dims, rope.base, rope.scale
        if key not in self._turns:
            half, rows = rope.dims // 2, offset.size if shared else 1
            units = mx.array([1.0] * half + [0.0] * half, x.dtype)  # turned, they are cosines and sines
            units = mx.broadcast_to(units, (rows, 1, x.shape[2], rope.dims))
            cosines, sines = mx.split(RoPE.__call__(rope, units, offset), 2, axis=-1)
            self._turns[key] = cosines, sines
        return self._turns[key]


class SharingRoPE(RoPE):
    """Positions of a model whose layers share their angles."""

    angles: Angles

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """See RoPE."""
        turn = self.angles.turn(self, x, offset)
        if turn is None:
            out: mx.array = super().__call__(x, offset)
            return out
        cosines, sines = turn
        ends: Any = [self.dims // 2, self.dims] if self.dims < x.shape[-1] else 2
        first, second, *rest = mx.split(x, ends, axis=-1)
        return mx.concatenate([first * cosines - second * sines, first * sines + second * cosines, *rest], axis=-1)


def share_angles(model: Any) -> Angles:
    """Have all layers of a model share what they turn by; returns it."""
    angles = Angles()
    # A class of this model's own, which refers to no model: its weights would be kept until the garbage is collected.
    own = type("SharingRoPE", (SharingRoPE,), {"angles": angles})
    for module in model.modules():
        if type(module) is RoPE or isinstance(module, SharingRoPE):
            module.__class__ = own
    return angles
