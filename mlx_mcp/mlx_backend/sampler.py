"""Chooses the next token of a row from its logits."""

from __future__ import annotations

import mlx.core as mx

from mlx_mcp.core.sequence import SamplingParams


def next_token(logits: mx.array, params: SamplingParams, index: int) -> mx.array:
    """The row's token number `index`, as a lazy scalar.

    logits: [vocab]. The draw depends on nothing but logits, seed and index: not on the batch, and not on what was drawn
    before, so that a row that is resumed goes on with the same text.
    """
    if params.temperature == 0:
        return mx.argmax(logits)
    logits = logits.astype(mx.float32) / params.temperature
    if params.top_p < 1:
        logits = nucleus(logits, params.top_p)
    return mx.random.categorical(logits, key=draw_key(params.seed, index))


def nucleus(logits: mx.array, top_p: float) -> mx.array:
    """Rule out every token beyond the likeliest ones that together reach `top_p` (Holtzman et al., arXiv 1904.09751).

    The likeliest is always kept; tokens as likely as the last one kept are kept too.
    """
    descending = -mx.sort(-logits)
    probs = mx.softmax(descending)
    likelier = mx.cumsum(probs) - probs
    threshold = mx.min(mx.where(likelier < top_p, descending, mx.inf))
    return mx.where(logits < threshold, -mx.inf, logits)


def draw_key(seed: int, index: int) -> mx.array:
    """A random key for one draw: SplitMix64 of seed and index, so that neighbours share nothing."""
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return mx.random.key(x ^ (x >> 31))
