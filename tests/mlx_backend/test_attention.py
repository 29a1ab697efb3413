"""Rows that share a prefix against the same rows laid out whole, bit by bit: the wheel's BLAS adds up in order."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from mlx_mcp.core.slots import SharedPrefix, Slab, Slot
from mlx_mcp.mlx_backend.attention import FullLayer, KvBits, RowCache, SlotsCache, hook, num_shared, plan
from tests.effort import EFFORT
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


@settings(max_examples=25 * EFFORT, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, LONG, SHORT]), st.integers(1, 130)), min_size=1, max_size=8), st.data()
)
def test_rows_of_any_lengths_in_any_slots_are_what_they_are_whole(drawn, data):
    slots = [Slot(slab, i) for slab in (FIRST, SECOND) for i in range(8)]
    chosen = sorted(data.draw(st.permutations(range(16)))[: len(drawn)])
    shared, whole = Rows([(slots[i], *row) for i, row in zip(chosen, drawn, strict=True)]).both()
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
