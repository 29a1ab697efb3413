"""The softmax of attention scores that come in several parts, such as those of a shared prefix and of a row's slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx

Masks = list[mx.array | None]
Weights = tuple[list[mx.array], mx.array]  # the weights of each part, and what to divide their sums of values by


@dataclass(frozen=True)
class Softmax:
    """One way to compute the softmax of attention.

    `weigh(scores, masks, sinks)` returns the weights for scores [rows, kv_heads, heads per kv_head, tokens] in parts,
    and the divisor. `masks` are bool, one for each part, broadcast to it; a masked score gets no weight. A head's sink,
    of sinks [heads], is one more score that takes weight and has no value. Scores must be multiplied by `factor` first.
    """

    weigh: Callable[[list[mx.array], Masks, mx.array | None], Weights]
    factor: float = 1.0


def by_mlx(scores: list[mx.array], masks: Masks, sinks: mx.array | None) -> Weights:
    """See Softmax: by MLX's own softmax, of all parts in one."""
    kv_heads, each = scores[0].shape[1:3]
    masked = [part if mask is None else mx.where(mask, part, -mx.inf) for part, mask in zip(scores, masks, strict=True)]
    if sinks is not None:  # ahead of the tokens, as in mx.fast
        masked.insert(0, mx.broadcast_to(sinks.reshape(1, kv_heads, each, 1), (len(scores[0]), kv_heads, each, 1)))
    weights = mx.softmax(mx.concatenate(masked, axis=-1), axis=-1, precise=True)
    ends: Any = list(accumulate(part.shape[-1] for part in masked))
    parts = list(mx.split(weights, ends[:-1], axis=-1))
    return parts if sinks is None else parts[1:], mx.array(1.0, weights.dtype)


MLX = Softmax(by_mlx)
