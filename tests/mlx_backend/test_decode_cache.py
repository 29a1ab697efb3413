"""Rows that share a prefix beside the same rows without sharing, bit by bit: the wheel's BLAS adds up in order.

With the arithmetic for CPUs they are within 1e-6 of it, on any BLAS.
"""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from mlx_mcp.core.slots import SharedPrefix, Slab, Slot
from mlx_mcp.mlx_backend.decode_cache import DecodeCache
from mlx_mcp.mlx_backend.hook import hook
from mlx_mcp.mlx_backend.placement import place
from mlx_mcp.mlx_backend.prefill_cache import PrefillCache
from mlx_mcp.mlx_backend.slabs import FullLayer, num_shared
from tests.effort import drawn
from tests.mlx_backend.layer_rows import FIRST, LONG, ROWS, SECOND, SHORT, Rows, use_cpu_attention
from tests.models_made import make_model


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


def test_a_row_whose_numbers_are_none_spoils_no_other_of_its_prefix():
    rows = Rows()
    fine, _ = rows.both()
    rows.queries[1] = mx.nan
    broken, _ = rows.both()
    assert np.isnan(broken[1]).all()
    assert (np.delete(broken, 1, 0) == np.delete(fine, 1, 0)).all()


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
            caches = [PrefillCache(layer, slot, start, common) for layer in layers]
            logits = model(mx.array([prompt[start : start + 16]]), cache=caches)
        return np.array(logits[:, -1])

    def decode(layers, common=None):
        placement = place([(slot, len(prompt), common) for slot, prompt in zip(slots, prompts, strict=True)])
        return np.array(model(mx.array([[5], [6], [7]]), cache=[DecodeCache(layer, placement) for layer in layers]))

    expected = [read(slot, prompt, whole) for slot, prompt in zip(slots, prompts, strict=True)]
    for to, layer in zip(shared, whole, strict=True):
        to.prefixes[1] = tuple([mx.contiguous(planes[0][:1, :, :48])] for planes in layer.slabs[FIRST.slab_id])
    got = [read(slot, prompt, shared, prefix) for slot, prompt in zip(slots, prompts, strict=True)]
    assert np.array_equal(got, expected)
    assert np.array_equal(decode(shared, prefix), decode(whole))


@pytest.mark.parametrize("window", [None, 1, 30, 60])
@pytest.mark.parametrize("sinks", [None, mx.array([0.5, -1.0, 3.0, 0.0])])
@pytest.mark.parametrize("bits", [None, 8])
def test_rows_on_a_cpu_differ_from_the_same_rows_by_rounding_alone(monkeypatch, window, sinks, bits):
    if bits and sinks is not None:
        pytest.skip("mlx-lm has no quantized attention with sinks")
    before = Rows(kv_bits=bits).both(window, sinks)
    use_cpu_attention(monkeypatch)
    for mine, theirs in zip(Rows(kv_bits=bits).both(window, sinks), before, strict=True):
        assert np.abs(mine - theirs).max() <= 1e-6


def test_what_lies_beyond_a_row_in_its_slot_counts_for_nothing_on_a_cpu(cpu_attention):
    rows = Rows()
    fine = rows.decode(rows.whole)
    for slot, prefix, num_tokens in ROWS:
        for (plane,) in rows.whole.slabs[slot.slab.slab_id]:
            plane[slot.index, :, num_shared(prefix) + num_tokens :] = 1e6
    assert (rows.decode(rows.whole) == fine).all()


def test_a_row_whose_numbers_are_none_spoils_no_other_on_a_cpu(cpu_attention):
    rows = Rows()
    fine = rows.both()
    rows.queries[1] = mx.nan
    for broken, was in zip(rows.both(), fine, strict=True):
        assert np.isnan(broken[1]).all()
        assert (np.delete(broken, 1, 0) == np.delete(was, 1, 0)).all()
