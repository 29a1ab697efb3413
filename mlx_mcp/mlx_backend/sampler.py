"""Chooses the next token of every row of a batch from its logits. Knows nothing of sequences, caches or grammars.

A row's token depends, to the bit, only on its own logits, tokens, mask, parameters and index. It depends neither on the
other rows nor on earlier draws, so that a row that is resumed continues with the same text. A backend may choose the
order of additions in a sum by the shape of the batch. So only sorts, maxima and running sums decide anything here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mcp.core.sequence import SamplingParams, TokenLogprobs
from mlx_mcp.mlx_backend import device

_BLOCK = 128  # divides most vocabularies
_ALMOST_1 = 1 - 2**-24  # the largest float32 below 1


@dataclass(frozen=True)
class Row:
    """One row to draw for."""

    params: SamplingParams
    index: int  # how many tokens it has produced: the number of this draw
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    mask: bytes | None = None  # a constraint's: one bit per token id, least significant bit of the first byte first


@dataclass(frozen=True)
class Choice:
    """A row's next token, and its log-probabilities if they were asked for.

    There is no token where the model's logits hold NaN or an infinity, or where the mask allows none.
    """

    token_id: int | None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a batch. `tokens` may still be lazy: the next step can be fed from it before it is read."""

    tokens: mx.array  # [rows] uint32; some token of the vocabulary even where a row gets none
    logits: mx.array  # [rows, vocab] float32, as the model gave them
    sums: mx.array  # [rows]: finite only where every logit is
    rows: Sequence[Row]
    kept: mx.array | None  # the logits that the host may read; those of all rows on a CPU
    places: dict[int, int]  # row → where its logits are in `kept`

    def arrays(self) -> list[mx.array]:
        """What must be evaluated before read()."""
        return [self.tokens, self.sums, *([] if self.kept is None else [self.kept])]

    def read(self) -> list[Choice]:
        """One choice per row. Blocks until arrays() are there."""
        tokens = np.asarray(self.tokens).tolist()
        suspects = np.flatnonzero(~np.isfinite(np.asarray(self.sums))).tolist()
        # On a CPU finite logits may add up to an infinity, so a sum only says where to look.
        broken = {i for i in suspects if i not in self.places or not np.isfinite(self.numbers(i)).all()}
        choices = []
        for i, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if i in broken or not _allows(row.mask, token):
                choices.append(Choice(None))
            elif row.params.logprobs is None:
                choices.append(Choice(token))
            else:
                # On the host: nothing waits for it, and ties can be put in order there.
                choices.append(Choice(token, _logprobs(self.numbers(i), token, row.params.logprobs)))
        return choices

    def numbers(self, i: int) -> Any:
        """The logits of row i, [vocab] in numpy: of a row that asked for log-probabilities, or that `draw` keeps."""
        return self._on_host[self.places[i]]

    @cached_property
    def _on_host(self) -> Any:
        # All of them, and then a row: an operation on them would wait behind a step that was run ahead.
        return np.asarray(self.kept)


def draw(logits: mx.array, rows: Sequence[Row], latest: mx.array | None = None, keep: Sequence[int] = ()) -> Drawn:
    """Choose the next token of every row.

    logits: [rows, vocab], any float dtype. `latest` [rows] are tokens that come after those of the rows, and that are
    still on the device; only where no row is drawn for `on_host`. The logits of the rows in `keep` can be read.
    Evaluates nothing, unless a row has a temperature and the device is a CPU.
    """
    logits = logits.astype(mx.float32)
    adjusted = _adjust(logits, rows, latest)
    tokens = mx.argmax(adjusted, axis=-1)
    warm = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if warm:
        chosen = adjusted[mx.array(warm)]
        # On a CPU numpy sorts and exponentiates about 30 times as fast as mlx; on a GPU everything stays there, lazily.
        x, xp = (np.asarray(chosen), np) if device.on_cpu() else (chosen, mx)
        with np.errstate(invalid="ignore", over="ignore"):  # rows that read() will find broken
            drawn = mx.array(sample(x, [rows[i] for i in warm], xp), dtype=mx.uint32)
        if len(warm) == len(rows):
            tokens = drawn
        else:
            tokens[mx.array(warm)] = drawn
    if device.on_cpu():
        return Drawn(tokens, logits, mx.sum(logits, axis=-1), rows, logits, {i: i for i in range(len(rows))})
    # Times 0, what is no number stays none and all else adds up to 0: nobody has to look at the logits themselves.
    sums = mx.sum(logits * 0.0, axis=-1)
    read = [i for i, row in enumerate(rows) if row.params.logprobs is not None or i in keep]
    kept = None if not read else logits if len(read) == len(rows) else logits[mx.array(read)]
    return Drawn(tokens, logits, sums, rows, kept, {i: at for at, i in enumerate(read)})


def on_host(params: SamplingParams) -> bool:
    """Whether drawing needs a row's logits or its latest token on the host, so that no step can run ahead of it.

    A row with a constraint always does: its mask follows from the latest token.
    """
    return device.on_cpu() and (params.temperature > 0 or _penalised(params))


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that decides draw `index`: SplitMix64 of both, so that neighbours share nothing.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. 24 bits, which a
    float32 holds exactly: both devices draw with the same number.
    """
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return float((x ^ (x >> 31)) >> 40) / (1 << 24)


def sample(logits: Any, rows: Sequence[Row], xp: Any) -> Any:
    """Draw from what temperature, top_k, top_p and min_p leave, by inverse CDF.

    logits: [rows, vocab] float32, of the array namespace `xp`: numpy, or mlx.core, which stays lazy. Returns token ids
    [rows]. Every row has a temperature.
    """
    params = [row.params for row in rows]
    # What float32 rounds to 0 is still a temperature.
    temperature = _column([max(p.temperature, 1e-30) for p in params], xp)
    weights = xp.exp((logits - xp.max(logits, axis=-1, keepdims=True)) / temperature)  # the likeliest token's is 1
    eligible = weights >= _column([min(p.min_p, 1.0) for p in params], xp)
    limited = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1]
    if limited:
        at = xp.array(limited)
        floor = _column([-np.inf] * len(rows), xp)
        floor[at] = _floor(logits[at], temperature[at], [params[i] for i in limited], xp)
        eligible = eligible & (logits >= floor)
    u = _column([uniform(row.params.seed, row.index) for row in rows], xp)
    return _first_above(weights * eligible, u, xp)


def _floor(logits: Any, temperature: Any, params: list[SamplingParams], xp: Any) -> Any:
    """The lowest logit that top_k and top_p leave (Holtzman et al., arXiv 1904.09751), [rows, 1].

    The probabilities are summed from below: the unlikeliest tokens are left out as long as their sum is at most
    1 - top_p. The small ones are added first, so that little precision is lost where top_p is close to 1.
    """
    vocab = logits.shape[-1]
    ascending = xp.sort(logits, axis=-1)
    first = xp.array([max(vocab - (p.top_k or vocab), 0) for p in params])[:, None]
    weights = xp.exp((ascending - ascending[:, -1:]) / temperature)
    weights = weights * (ascending >= xp.take_along_axis(ascending, first, axis=-1))
    lowest = _first_above(weights, _column([min(1 - p.top_p, _ALMOST_1) for p in params], xp), xp)
    return xp.take_along_axis(ascending, lowest[:, None], axis=-1)


def _first_above(weights: Any, fraction: Any, xp: Any) -> Any:
    """The first place, [rows], where the running sum of the weights exceeds that fraction (< 1) of their total.

    weights: [rows, vocab] float32, none negative. The weight of the place is never 0. Its block is found first,
    and then the place in it. This takes one cheap pass over all weights, and no sum is so long that float32 loses much.
    """
    num_rows, vocab = weights.shape
    if vocab % _BLOCK:
        weights = xp.pad(weights, ((0, 0), (0, -vocab % _BLOCK)))
    blocks = weights.reshape(num_rows, -1, _BLOCK)
    # numpy adds every block up alike; mlx's sum goes by the number of blocks, its scan does not. GPUs have no float64.
    sums = np.sum(blocks, axis=-1).astype(np.float64) if xp is np else mx.cumsum(blocks, axis=-1)[..., -1]
    # A parallel scan is not quite monotonic: what has no weight is never where it rises.
    so_far = xp.cumsum(sums, axis=-1) * (sums > 0)
    # A total times 1 - 2^-24 or less rounds to less than the total: there is always such a place.
    target = fraction * xp.max(so_far, axis=-1, keepdims=True)
    block = xp.argmax(so_far > target, axis=-1)
    before = xp.take_along_axis(so_far - sums, block[:, None], axis=-1)
    inside = blocks[xp.arange(num_rows), block]
    so_far = xp.cumsum(inside, axis=-1) * (inside > 0)
    # The block's own sums round differently, so what is left of the target may be a little too much for it.
    left = xp.clip(target - before, 0, _ALMOST_1 * xp.max(so_far, axis=-1, keepdims=True))
    return block * _BLOCK + xp.argmax(so_far > left, axis=-1)


def _column(values: list[float], xp: Any) -> Any:
    return xp.array(values, dtype=xp.float32)[:, None]


def _penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _adjust(logits: mx.array, rows: Sequence[Row], latest: mx.array | None = None) -> mx.array:
    """Penalties, then biases, then masks. Token ids in a bias that the model has no logits for change nothing."""
    vocab, on_cpu = logits.shape[-1], device.on_cpu()
    if not on_cpu and any(_penalised(row.params) for row in rows):
        logits = _penalise(logits, rows, latest)
    factors: dict[int, dict[int, float]] = {}  # row → token id → repetition penalty
    offsets: dict[int, dict[int, float]] = {}
    for i, row in enumerate(rows):
        p = row.params
        if on_cpu and p.repetition_penalty != 1:
            factors[i] = dict.fromkeys({*row.prompt_ids, *row.output_ids}, p.repetition_penalty)
        offsets[i] = {token: bias for token, bias in p.logit_bias if 0 <= token < vocab}
        if on_cpu and (p.presence_penalty or p.frequency_penalty):
            for token, count in Counter(row.output_ids).items():
                penalty = p.presence_penalty + p.frequency_penalty * count
                offsets[i][token] = offsets[i].get(token, 0) - penalty
    logits = mx.array(logits)  # an assignment changes the object, and the caller's stays as the model gave it
    if any(factors.values()):
        at, values = _entries(factors)
        logits[at] = mx.where(logits[at] > 0, logits[at] / values, logits[at] * values)
    if any(offsets.values()):
        at, values = _entries(offsets)
        logits[at] = logits[at] + values
    masks = {i: np.frombuffer(row.mask, np.uint8) for i, row in enumerate(rows) if row.mask is not None}
    if masks:
        masked = mx.array(list(masks))
        bits = [np.unpackbits(mask, count=vocab, bitorder="little") for mask in masks.values()]  # 0 beyond its end
        logits[masked] = mx.where(mx.array(np.stack(bits).view(np.bool_)), logits[masked], -mx.inf)
    return logits


def _penalise(logits: mx.array, rows: Sequence[Row], latest: mx.array | None) -> mx.array:
    """Penalties by tables of the whole vocabulary on the device, where `latest` counts although nobody has read it."""
    num_rows, vocab = logits.shape
    params = [row.params for row in rows]
    counts = _counts([row.output_ids if _penalised(row.params) else () for row in rows], vocab)
    if latest is not None:
        counts = counts.at[mx.arange(num_rows), latest].add(1)
    if any(p.repetition_penalty != 1 for p in params):
        seen = counts + _counts([row.prompt_ids if row.params.repetition_penalty != 1 else () for row in rows], vocab)
        factor = _column([p.repetition_penalty for p in params], mx)
        logits = mx.where(seen > 0, mx.where(logits > 0, logits / factor, logits * factor), logits)
    presence, frequency = ([getattr(p, f"{name}_penalty") for p in params] for name in ("presence", "frequency"))
    if any(presence) or any(frequency):
        logits = logits - (_column(presence, mx) * (counts > 0) + _column(frequency, mx) * counts)
    return logits


def _counts(tokens: list[Sequence[int]], vocab: int) -> mx.array:
    """How often each token is among each row's: [rows, vocab] int32."""
    rows = np.repeat(np.arange(len(tokens), dtype=np.int32), [len(ids) for ids in tokens])
    counts = mx.zeros((len(tokens), vocab), mx.int32)
    if not rows.size:
        return counts
    return counts.at[mx.array(rows), mx.array(np.fromiter(chain.from_iterable(tokens), np.int32))].add(1)


def _entries(tables: dict[int, dict[int, float]]) -> tuple[tuple[mx.array, mx.array], mx.array]:
    """Where the entries of row → token id → value lie, and the values."""
    rows = np.repeat(list(tables), [len(table) for table in tables.values()])
    tokens = np.fromiter(chain.from_iterable(tables.values()), np.int32)
    values = np.fromiter(chain.from_iterable(table.values() for table in tables.values()), np.float32)
    return (mx.array(rows.astype(np.int32)), mx.array(tokens)), mx.array(values)


def _allows(mask: bytes | None, token_id: int) -> bool:
    return mask is None or bool(token_id < 8 * len(mask) and mask[token_id // 8] >> token_id % 8 & 1)


def _logprobs(logits: Any, token_id: int, count: int) -> TokenLogprobs:
    """The log-probabilities from one row's logits, [vocab] in numpy. Equally likely tokens are ordered by id."""
    count = min(count, logits.size)
    logprobs = logits - logits.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    ids = np.flatnonzero(logits >= np.partition(logits, -count)[-count]) if count else np.arange(0)
    ids = ids[np.argsort(-logits[ids], kind="stable")][:count]
    return TokenLogprobs(float(logprobs[token_id]), tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True)))
