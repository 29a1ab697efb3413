"""Powers of two by a polynomial, and a softmax to the base of 2 that is made of them.

On x86 CPUs MLX computes exp of one number at a time, which is most of what attention takes there.
"""

from __future__ import annotations

from functools import reduce
from math import e, log2

import mlx.core as mx

from mlx_mcp.mlx_backend.softmax import Masks, Softmax, Weights

MASK_PENALTY = 1e30  # is subtracted from scores that are to get no weight
ROUND = 1.5 * 2**23  # added to a float32 of less than 2**22, it leaves the nearest whole number in the last bits
# The coefficients of the minimax polynomial of 2**x over [-1/2, 1/2], the highest power first, without the constant,
# which is 1. It is within 1e-7, and within 2e-7 after rounding.
COEFFICIENTS = (
    0.001326472731307149,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
)


def exp2(x: mx.array) -> mx.array:
    """2**x for x <= 0: within 2e-7 of it, exactly 0 from -127 down, NaN of NaN.

    x is reduced to the nearest whole number, and a polynomial of the rest is computed (Cody and Waite, Software Manual
    for the Elementary Functions, 1980); the whole number is added to the bits that are the exponent (Schraudolph, A
    Fast, Compact Approximation of the Exponential Function, 1999).
    """
    x = mx.maximum(x, -127.0)  # where the polynomial is 1, and its exponent 127 is taken to that of 0
    rounded = x + ROUND
    rest = x - (rounded - ROUND)
    p = rest * COEFFICIENTS[0]
    for coefficient in COEFFICIENTS[1:]:
        p = (p + coefficient) * rest
    return ((p + 1.0).view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32)


def maximum(scores: mx.array) -> mx.array:
    """The maximum over the last axis, which is kept; NaN where a score is NaN."""
    while scores.shape[-1] > 512:  # MLX's own maximum is slower than comparing one half with the other
        half = (scores.shape[-1] + 1) // 2
        scores = mx.maximum(scores[..., :half], scores[..., -half:])
    return scores.max(axis=-1, keepdims=True)


def weigh(scores: list[mx.array], masks: Masks, sinks: mx.array | None) -> Weights:
    """See Softmax. A row with a NaN or +inf among its scores is NaN, and no other row is."""
    kv_heads, each = scores[0].shape[1:3]
    # Adding takes less time than mx.where, which takes longer than all of exp2.
    masked = [
        part if mask is None else part + (mask.astype(mx.float32) - 1.0) * MASK_PENALTY
        for part, mask in zip(scores, masks, strict=True)
    ]
    sink = None if sinks is None else sinks.reshape(1, kv_heads, each, 1) * BASE_2.factor
    top = reduce(mx.maximum, [maximum(part) for part in masked] + ([] if sink is None else [sink]))
    weights = [exp2(part - top) for part in masked]
    total = top - top if sink is None else exp2(sink - top)  # not 0: it must be NaN where the maximum is no number
    for part in weights:
        total = mx.addmm(total, part, mx.ones((part.shape[-1], 1)))  # faster than mx.sum
    return weights, total


BASE_2 = Softmax(weigh, factor=log2(e))
