"""Rows that share a prefix against the same rows laid out whole, bit by bit: the wheel's BLAS adds up in order.

What OpenBLAS is there for, attention by `power`, is within 1e-6 of mlx's on any BLAS.
"""

import os
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from mlx_mcp.core.slots import SharedPrefix, Slab, Slot
from mlx_mcp.mlx_backend import attention, chunk_attention
from mlx_mcp.mlx_backend.attention import (
    ChunksCache,
    FullLayer,
    KvBits,
    RowCache,
    SlotsCache,
    hook,
    num_shared,
    plan,
)
from mlx_mcp.mlx_backend.blas import find_openblas
from tests.effort import drawn
from tests.models_made import make_model

FIRST, SECOND = Slab(0, 256, 8), Slab(1, 256, 8)
LONG, SHORT = SharedPrefix(5, 70), SharedPrefix(2, 33)
# slot, prefix, tokens after it, this step's included: in order of slab and slot, with gaps
ROWS = [
    (Slot(FIRST, 0), LONG, 6),
    (Slot(FIRST, 1), LONG, 6),
    (Slot(FIRST, 2), SHORT, 40),
    (Slot(FIRST, 3), None, 90),
    (Slot(FIRST, 5), LONG, 1),
    (Slot(FIRST, 6), LONG, 77),
    (Slot(SECOND, 1), None, 3),
    (Slot(SECOND, 2), None, 50),
    (Slot(SECOND, 4), SHORT, 2),
    (Slot(SECOND, 7), LONG, 20),
]


class Rows:
    """Random rows of one layer, with their prefixes shared and laid out whole."""

    def __init__(self, rows=ROWS, heads=4, kv_heads=2, key_width=64, value_width=64, kv_bits=None):
        mx.random.seed(0)
        kv_bits = KvBits(kv_bits, 32) if kv_bits else None
        self.rows, self.shared, self.whole = rows, FullLayer(kv_bits), FullLayer(kv_bits)
        self.queries = mx.random.normal((len(rows), heads, 1, key_width))
        self.scale = key_width**-0.5

        def tokens(num_tokens):
            return [mx.random.normal((1, kv_heads, num_tokens, width)) for width in (key_width, value_width)]

        first = {prefix: tokens(num_shared(prefix)) for _, prefix, _ in rows}
        for prefix in first.keys() - {None}:
            keys, values = (list(self.shared.encode(x)) for x in first[prefix])
            self.shared.prefixes[prefix.prefix_id] = keys, values
        self.tokens = []  # each row's: keys and values [1, kv_heads, tokens, width]
        for _, prefix, num_tokens in rows:
            pairs = zip(first[prefix], tokens(num_tokens), strict=True)
            self.tokens.append([mx.concatenate(pair, axis=2) for pair in pairs])

    def decode(self, layer, window=None, sinks=None, shared=False):
        """Attention of one more token per row: its last, the others being there."""
        where = []
        for (slot, prefix, _), (keys, values) in zip(self.rows, self.tokens, strict=True):
            prefix, last = prefix if shared else None, keys.shape[2] - 1
            if last > num_shared(prefix):
                layer.write(slot, 0, *(layer.encode(x[:, :, num_shared(prefix) : last]) for x in (keys, values)))
            where.append((slot, last, prefix))
        cache = SlotsCache(layer, plan(where))
        new = [mx.concatenate([row[i][:, :, -1:] for row in self.tokens]) for i in (0, 1)]
        kept, _ = cache.update_and_fetch(*new)
        return np.array(kept.keeper.attend(self.queries, self.scale, window, sinks))

    def both(self, window=None, sinks=None):
        """What comes out with shared prefixes, and what with every row whole."""
        return self.decode(self.shared, window, sinks, shared=True), self.decode(self.whole, window, sinks)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("widths", [(64, 64), (32, 64), (48, 16)])
def test_rows_that_share_a_prefix_are_bit_by_bit_what_they_are_whole(kv_heads, widths):
    shared, whole = Rows(ROWS, 4, kv_heads, *widths).both()
    assert shared.shape == (len(ROWS), 4, 1, widths[1])
    assert (shared == whole).all()


@settings(max_examples=drawn(25, least=5), deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, LONG, SHORT]), st.integers(1, 130)), min_size=1, max_size=8), st.data()
)
def test_rows_of_any_lengths_in_any_slots_are_what_they_are_whole(rows, data):
    slots = [Slot(slab, i) for slab in (FIRST, SECOND) for i in range(8)]
    chosen = sorted(data.draw(st.permutations(range(16)))[: len(rows)])
    shared, whole = Rows([(slots[i], *row) for i, row in zip(chosen, rows, strict=True)]).both()
    assert (shared == whole).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_quantized_rows_that_share_a_prefix_differ_by_rounding_alone(bits, kv_heads):
    shared, whole = Rows(kv_heads=kv_heads, kv_bits=bits).both()
    alone = [i for i, (_, prefix, _) in enumerate(ROWS) if prefix is None]
    assert (shared[alone] == whole[alone]).all()
    assert np.abs(shared - whole).max() <= 1e-6


@pytest.mark.parametrize("window", [1, 5, 30, 60, 500])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_window_reaches_as_far_back_into_a_prefix_as_into_a_slot(window, bits):
    shared, whole = Rows(kv_bits=bits).both(window)
    assert np.abs(shared - whole).max() <= (1e-6 if bits else 0)


@pytest.mark.parametrize("window", [1, 5, 60])
def test_a_window_holds_the_last_tokens_and_no_other(window):
    rows = Rows(kv_heads=4)
    found = rows.decode(rows.whole, window)
    for out, query, pair in zip(found, np.array(rows.queries), rows.tokens, strict=True):
        keys, values = (np.array(x)[0, :, -window:] for x in pair)
        weights = np.exp(rows.scale * query @ keys.swapaxes(-1, -2))
        expected = weights / weights.sum(axis=-1, keepdims=True) @ values
        assert np.abs(out - expected).max() < 1e-5


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sinks_take_as_much_weight_of_rows_that_share_a_prefix(kv_heads, window):
    shared, whole = Rows(kv_heads=kv_heads).both(window, mx.array([0.5, -1.0, 3.0, 0.0]))
    assert (shared == whole).all()


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_a_chunk_of_a_row_that_shares_its_prefix_is_bit_by_bit_what_it_is_whole(bits, num_tokens):
    rows, (slot, _, _) = Rows(ROWS[:1], kv_bits=bits), ROWS[0]
    queries = mx.random.normal((1, 4, num_tokens, 64))
    keys, values = mx.random.normal((2, 1, 2, num_tokens, 64))
    outs = []
    for layer, prefix in ((rows.shared, LONG), (rows.whole, None)):
        rows.decode(layer, shared=prefix is not None)  # for the tokens before
        cache = RowCache(layer, slot, 76, prefix)
        kept, _ = cache.update_and_fetch(keys, values)
        outs.append(np.array(kept.keeper.attend(queries, rows.scale, cache.make_mask(num_tokens), None)))
        assert cache.offset == 76 + num_tokens
    assert (outs[0] == outs[1]).all()


def test_a_row_whose_numbers_are_none_spoils_no_other_of_its_prefix():
    rows = Rows()
    fine, _ = rows.both()
    rows.queries[1] = mx.nan
    broken, _ = rows.both()
    assert np.isnan(broken[1]).all()
    assert (np.delete(broken, 1, 0) == np.delete(fine, 1, 0)).all()


def test_positions_count_the_prefix():
    where = plan([(slot, num_shared(prefix) + n, prefix) for slot, prefix, n in ROWS[:4]])
    assert where.offsets.tolist() == [76, 76, 73, 90]
    assert [run.positions.tolist() for run in where.runs] == [[6, 6], [40], [90]]


@pytest.mark.parametrize("bits", [None, 8])
def test_a_prefix_is_counted_once_for_all_its_rows(bits):
    rows = Rows([(Slot(FIRST, i), LONG, 1) for i in range(8)], kv_bits=bits)
    per_token = 2 * (64 + 64) * (4 if bits is None else 1 + 8 / 32)  # a scale and a bias for each 32
    assert rows.shared.nbytes == 70 * per_token
    rows.both()
    assert rows.whole.nbytes == 8 * 256 * per_token
    assert rows.shared.nbytes == rows.whole.nbytes + 70 * per_token


@pytest.mark.parametrize("bits", [None, 8])
def test_decoding_never_copies_a_prefix_for_its_rows(bits):
    prefix = SharedPrefix(1, 512)
    rows = Rows([(Slot(Slab(0, 64, 8), i), prefix, 7 + i) for i in range(8)], 8, 4, 64, 64, bits)
    rows.decode(rows.shared, shared=True)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    rows.decode(rows.shared, shared=True)
    taken = mx.get_peak_memory() - before
    one_copy = sum(plane.nbytes for planes in rows.shared.prefixes[1] for plane in planes)
    assert taken < 2 * one_copy  # of eight


def test_a_model_draws_from_the_same_logits_over_a_shared_prefix(tmp_path):
    model, _ = load_model(make_model(tmp_path))
    hook(model)
    prefix, slots = SharedPrefix(1, 48), [Slot(FIRST, i) for i in (0, 1, 4)]
    prompts = [[*range(7, 55), *range(100 + i, 100 + i + n)] for i, n in enumerate((9, 16, 1))]
    whole, shared = ([FullLayer(None) for _ in model.layers] for _ in range(2))

    def read(slot, prompt, layers, common=None):
        for start in range(common.num_tokens if common else 0, len(prompt), 16):
            caches = [RowCache(layer, slot, start, common) for layer in layers]
            logits = model(mx.array([prompt[start : start + 16]]), cache=caches)
        return np.array(logits[:, -1])

    def decode(layers, common=None):
        where = plan([(slot, len(prompt), common) for slot, prompt in zip(slots, prompts, strict=True)])
        return np.array(model(mx.array([[5], [6], [7]]), cache=[SlotsCache(layer, where) for layer in layers]))

    expected = [read(slot, prompt, whole) for slot, prompt in zip(slots, prompts, strict=True)]
    for to, layer in zip(shared, whole, strict=True):
        to.prefixes[1] = tuple([mx.contiguous(planes[0][:1, :, :48])] for planes in layer.slabs[FIRST.slab_id])
    got = [read(slot, prompt, shared, prefix) for slot, prompt in zip(slots, prompts, strict=True)]
    assert np.array_equal(got, expected)
    assert np.array_equal(decode(shared, prefix), decode(whole))


# By power


@pytest.fixture
def by_power(monkeypatch):
    """Attention as with OpenBLAS in front, to however few scores, in many pieces."""
    monkeypatch.setattr(attention, "by_power", lambda num_scores, dtype: True)
    monkeypatch.setattr(attention, "PIECE", 1000)
    in_pieces(monkeypatch, 1000)


def in_pieces(monkeypatch, num_scores):
    """Have a chunk's attention take so many scores at a time, however few queries that is."""
    monkeypatch.setattr(chunk_attention, "SCORES", num_scores)
    monkeypatch.setattr(chunk_attention, "FEWEST", 1)


def test_a_power_of_two_is_right_to_the_last_bits():
    x = -np.concatenate([np.arange(0, 126, 2**-9), np.random.default_rng(0).exponential(9, 100_000)])
    x = np.maximum(x, -126).astype(np.float32)
    expected = np.exp2(x.astype(np.float64))
    assert np.abs(np.array(attention.power(mx.array(x))) / expected - 1).max() < 3e-7


def test_what_is_barred_gets_no_weight_at_all():
    assert attention.power(mx.array([-127.0, -1000.0, -attention.BAR, -mx.inf])).tolist() == [0, 0, 0, 0]
    assert attention.power(mx.array([0.0, -1.0, -126.0])).tolist() == [1, 0.5, 2**-126]
    assert np.isnan(attention.power(mx.array(mx.nan)))


@pytest.mark.parametrize("spread", [0.1, 1, 80])
@pytest.mark.parametrize("sizes", [[1], [7], [513], [2000, 3], [5, 1100, 40]])
@pytest.mark.parametrize("sinks", [None, mx.array([0.5, -90.0, 90.0])])
def test_weights_by_power_are_those_of_a_softmax(spread, sizes, sinks):
    mx.random.seed(1)
    scores = [mx.random.uniform(-spread, spread, (2, 1, 3, size)) for size in sizes]
    masks = [mx.random.uniform(shape=(2, 1, 1, size)) < 0.8 for size in sizes]
    masks[0][..., 0] = True
    expected, _ = attention.softmax(scores, masks, sinks, False)
    weights, total = attention.softmax([part * attention.LOG2E for part in scores], masks, sinks, True)
    for mine, theirs, mask in zip(weights, expected, masks, strict=True):
        assert mx.abs(mine / total - theirs).max() < 1e-6
        assert mx.where(mask, 0, mine).max() == 0


@pytest.mark.parametrize("number", [mx.nan, mx.inf, -mx.nan])
def test_a_score_that_is_no_number_spoils_its_own_row(number):
    scores = mx.random.normal((1, 1, 4, 700))
    fine, _ = attention.weigh([scores], None)
    scores[0, 0, 2, 33] = number
    weights, total = attention.weigh([scores[..., :500], scores[..., 500:]], None)
    assert np.isnan(total.flatten().tolist()).tolist() == [False, False, True, False]
    assert mx.array_equal(mx.concatenate(weights, -1)[:, :, [0, 1, 3]], fine[0][:, :, [0, 1, 3]])


# The larger gives almost all weight to one token, by scores of about 80 that are themselves rounded.
SCALES = ((0.125, 2e-6), (3.0, 5e-5))


@pytest.mark.parametrize("heads", [8, 4, 2])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("sinks", [None, 2.0])
def test_decoding_by_power_is_what_mlx_computes(by_power, heads, rows, sinks):
    mx.random.seed(2)
    q, k, v = (mx.random.normal((rows, h, n, 64)) for h, n in ((heads, 1), (2, 90), (2, 90)))
    sinks = None if sinks is None else mx.random.normal((heads,)) * sinks
    mask = (mx.arange(90) < mx.random.randint(1, 90, (rows, 1)))[:, None, None]
    for scale, bound in SCALES:
        for m in (mask, None):
            expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=m, sinks=sinks)
            assert mx.abs(attention.attention(q, k, v, scale, m, sinks) - expected).max() < bound


@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("piece", [60, pytest.param(3000, marks=pytest.mark.slow), 1 << 19])
@pytest.mark.parametrize(("chunk", "before"), [(1, 40), pytest.param(40, 0, marks=pytest.mark.slow), (37, 3), (9, 700)])
@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_chunk_by_power_is_what_mlx_computes(monkeypatch, heads, piece, chunk, before, window, sinks, rows):
    in_pieces(monkeypatch, piece)
    mx.random.seed(3)
    q, own_k, own_v = (mx.random.normal((rows, h, n, 64)) for h, n in ((heads, chunk), (2, chunk + 1), (2, chunk + 1)))
    prefix = tuple(mx.random.normal((1, 2, before - 1, 64)) for _ in range(2)) if before > 1 else None
    k, v = own_k, own_v
    if prefix is not None:
        k, v = (mx.concatenate([mx.repeat(x, rows, 0), y], 2) for x, y in zip(prefix, (own_k, own_v), strict=True))
    tokens = k.shape[2]
    at = mx.arange(tokens - chunk, tokens)[:, None]
    causal = mx.arange(tokens) <= at
    mask = causal if window is None else causal & (mx.arange(tokens) > at - window)
    of_last = causal[:, -chunk:] if window is None else mask
    sinks = mx.random.normal((heads,)) if sinks else None
    for scale, bound in SCALES:
        expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
        got = chunk_attention.chunk_attention(q, prefix, (own_k, own_v), of_last[None], scale, sinks)
        assert mx.abs(got - expected).max() < bound


def test_a_chunk_whose_scores_are_more_than_the_buffer_has_gets_memory_of_its_own():
    q, k, v = (mx.random.normal((1, h, n, 4)) for h, n in ((1, 64), (1, 20_000), (1, 20_000)))
    assert chunk_attention.SCORES < 64 * 20_000
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5)
    assert mx.abs(chunk_attention.chunk_attention(q, None, (k, v), None, 0.5, None) - expected).max() < 1e-6


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("chunk", "heads"), [(1, 2), (29, 8), (128, 2)])
def test_a_chunk_is_the_same_to_a_rounding_however_many_threads_share_it(monkeypatch, threads, rows, chunk, heads):
    mx.random.seed(4)
    q, k, v = (mx.random.normal((rows, h, n, 64)) for h, n in ((heads, chunk), (2, 300), (2, 300)))
    prefix = tuple(mx.random.normal((1, 2, 200, 64)) for _ in range(2))
    alone = chunk_attention.chunk_attention(q, prefix, (k, v), "causal", 0.125, None)
    monkeypatch.setattr(chunk_attention, "num_threads", lambda: threads)
    monkeypatch.setattr(chunk_attention, "WORTH", 1)
    chunk_attention.pool.cache_clear()
    todo = chunk_attention.pieces(rows, 2, chunk, heads // 2, 500, threads)
    assert len(todo) >= min(threads, rows * 2 * chunk), "some of the threads have nothing to do"
    shared = chunk_attention.chunk_attention(q, prefix, (k, v), "causal", 0.125, None)
    chunk_attention.pool.cache_clear()
    assert mx.abs(shared - alone).max() < 2e-6


@pytest.mark.parametrize("broken", [0, 1])
def test_work_that_fails_on_one_thread_fails_once_the_others_have_ended(monkeypatch, broken):
    monkeypatch.setattr(chunk_attention, "num_threads", lambda: 3)
    chunk_attention.pool.cache_clear()
    ended = []

    def work(thread):
        if thread == broken:
            raise ZeroDivisionError
        time.sleep(0.05)
        ended.append(thread)

    with pytest.raises(ZeroDivisionError):
        chunk_attention.share(3, work)
    chunk_attention.pool.cache_clear()
    assert sorted(ended) == [thread for thread in range(3) if thread != broken]


@pytest.mark.parametrize("number", [mx.nan, mx.inf, -mx.nan])
def test_a_key_that_is_no_number_spoils_the_queries_that_attend_to_it(number):
    q, k, v = (mx.random.normal((1, h, n, 16)) for h, n in ((2, 30), (1, 60), (1, 60)))
    q, k[0, 0, 45] = mx.abs(q), number
    mask = mx.arange(60) <= mx.arange(30, 60)[:, None]  # the queries from the 15th on attend to that key
    out = chunk_attention.chunk_attention(q, None, (k, v), mask[None], 0.25, None)
    assert mx.isnan(out[:, :, 15:]).all()


@pytest.mark.parametrize("window", [None, 1, 30, 60])
@pytest.mark.parametrize("sinks", [None, mx.array([0.5, -1.0, 3.0, 0.0])])
@pytest.mark.parametrize("bits", [None, 8])
def test_rows_by_power_differ_from_the_same_rows_by_rounding_alone(monkeypatch, window, sinks, bits):
    if bits and sinks is not None:
        pytest.skip("mlx-lm has no quantized attention with sinks")
    before = Rows(kv_bits=bits).both(window, sinks)
    monkeypatch.setattr(attention, "by_power", lambda num_scores, dtype: True)
    for mine, theirs in zip(Rows(kv_bits=bits).both(window, sinks), before, strict=True):
        assert np.abs(mine - theirs).max() <= 1e-6


def test_what_lies_beyond_a_row_in_its_slot_counts_for_nothing_by_power(by_power):
    rows = Rows()
    fine = rows.decode(rows.whole)
    for slot, prefix, num_tokens in ROWS:
        for (plane,) in rows.whole.slabs[slot.slab.slab_id]:
            plane[slot.index, :, num_shared(prefix) + num_tokens :] = 1e6
    assert (rows.decode(rows.whole) == fine).all()


def test_a_row_whose_numbers_are_none_spoils_no_other_by_power(by_power):
    rows = Rows()
    fine = rows.both()
    rows.queries[1] = mx.nan
    for broken, was in zip(rows.both(), fine, strict=True):
        assert np.isnan(broken[1]).all()
        assert (np.delete(broken, 1, 0) == np.delete(was, 1, 0)).all()


def test_a_query_whose_numbers_are_none_spoils_no_other_of_its_chunk_by_power(by_power):
    queries, keys, values = (mx.random.normal((1, h, 20, 64)) for h in (4, 2, 2))
    causal = mx.tri(20)[None] > 0
    fine = chunk_attention.chunk_attention(queries, None, (keys, values), causal, 0.125, None)
    queries[:, :, 7] = mx.nan
    broken = chunk_attention.chunk_attention(queries, None, (keys, values), causal, 0.125, None)
    assert mx.isnan(broken[:, :, 7]).all()
    assert (np.delete(np.array(broken), 7, 2) == np.delete(np.array(fine), 7, 2)).all()


@pytest.mark.parametrize("window", [None, 20])
def test_a_chunk_by_power_reads_a_shared_prefix_where_it_lies(monkeypatch, window):
    prefix, slot = SharedPrefix(1, 4096), Slot(Slab(0, 64, 1), 0)
    layer = FullLayer(None)
    layer.prefixes[1] = tuple([mx.random.normal((1, 2, 4096, 64))] for _ in range(2))
    queries, keys, values = (mx.random.normal((1, h, 8, 64)) for h in (4, 2, 2))
    mx.eval(layer.prefixes, queries, keys, values)

    def attend():
        cache = RowCache(layer, slot, 4096, prefix)
        mask = cache.make_mask(8, window_size=window)
        kept, _ = cache.update_and_fetch(keys, values)
        return np.array(kept.keeper.attend(queries, 0.125, mask, None))

    expected = attend()
    monkeypatch.setattr(attention, "by_power", lambda num_scores, dtype: True)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert np.abs(attend() - expected).max() < 1e-6
    assert mx.get_peak_memory() - before < layer.prefixes[1][0][0].nbytes


SIZES = [9, 1, 12, 5]  # of chunks of four rows


def read(rows, picked, together, queries, keys, values, window=None):
    """The attention of a chunk of each of the picked rows, read in one pass or one after another."""
    layer = rows.shared
    rows.decode(layer, shared=True)  # for the tokens before
    caches = [RowCache(layer, slot, num_shared(prefix) + n, prefix) for slot, prefix, n in (ROWS[i] for i in picked)]
    passes = [(ChunksCache(caches, SIZES), slice(0, 4))] if together else []
    passes = passes or [(cache, slice(i, i + 1)) for i, cache in enumerate(caches)]
    outs = []
    for cache, some in passes:
        longest = max(SIZES[some])
        mask = cache.make_mask(longest, window_size=window)
        kept, _ = cache.update_and_fetch(keys[some, :, :longest], values[some, :, :longest])
        outs.append(kept.keeper.attend(queries[some, :, :longest], rows.scale, mask, None))
    each = list(outs[0]) if together else [out[0] for out in outs]
    return [np.array(out[:, :size]) for out, size in zip(each, SIZES, strict=True)]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("picked", [(0, 1, 4, 5), (0, 2, 3, 9)])
def test_chunks_read_in_one_pass_are_bit_by_bit_what_each_is_alone(picked, window, bits):
    queries, keys, values = (mx.random.normal((4, h, 12, 64)) for h in (4, 2, 2))
    alone, together = (read(Rows(kv_bits=bits), picked, way, queries, keys, values, window) for way in (False, True))
    assert all((one == other).all() for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("picked", [(0, 1, 4, 5), (0, 2, 3, 9)])
def test_chunks_read_in_one_pass_differ_by_rounding_alone_by_power(monkeypatch, picked):
    queries, keys, values = (mx.random.normal((4, h, 12, 64)) for h in (4, 2, 2))
    alone = read(Rows(), picked, False, queries, keys, values)
    monkeypatch.setattr(attention, "by_power", lambda num_scores, dtype: True)
    for piece in (100, 1000, 1 << 19):
        in_pieces(monkeypatch, piece)
        for one, other in zip(alone, read(Rows(), picked, True, queries, keys, values), strict=True):
            assert np.abs(one - other).max() < 1e-6


@pytest.mark.parametrize("of", ["queries", "keys", "values"])
def test_a_chunk_whose_numbers_are_none_spoils_no_other_of_its_pass_by_power(by_power, of):
    tensors = {name: mx.random.normal((4, h, 12, 64)) for name, h in (("queries", 4), ("keys", 2), ("values", 2))}
    fine = read(Rows(), (0, 1, 4, 5), True, **tensors)
    tensors[of][2] = mx.nan
    broken = read(Rows(), (0, 1, 4, 5), True, **tensors)
    assert np.isnan(broken[2]).all()
    assert all((broken[i] == fine[i]).all() for i in (0, 1, 3))


@pytest.mark.parametrize("way", ["none", "asked for", "preloaded"])
def test_attention_goes_by_power_where_openblas_is_in_front_and_nowhere_else(way):
    path, environment = find_openblas(), {name: x for name, x in os.environ.items() if name != "LD_PRELOAD"}
    if way != "none" and path is None:
        pytest.skip("OpenBLAS is not installed")
    if way == "preloaded":
        environment["LD_PRELOAD"] = path
    program = f"""
from mlx_mcp.mlx_backend.blas import openblas_in_front, prefer_openblas
assert {way != "asked for"} or prefer_openblas()
import mlx.core as mx
from mlx_mcp.mlx_backend.attention import FEW, by_power
mx.set_default_device(mx.cpu)
print(openblas_in_front(), by_power(FEW + 1, mx.float32), by_power(FEW, mx.float32), by_power(FEW + 1, mx.bfloat16))
"""
    options = {"capture_output": True, "text": True, "timeout": 60, "check": True, "env": environment}
    found, there = subprocess.run([sys.executable, "-c", program], **options), str(way != "none")
    assert found.stdout.split() == [there, there, "False", "False"]
