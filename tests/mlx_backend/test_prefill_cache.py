"""Chunks of prompts: over a shared prefix, and of several rows in one pass, bit by bit what each is alone."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mcp.core.slots import SharedPrefix, Slab, Slot
from mlx_mcp.mlx_backend import device, prefill_cache
from mlx_mcp.mlx_backend.prefill_cache import PrefillBatchCache, PrefillCache
from mlx_mcp.mlx_backend.slabs import FullLayer, KvBits, num_shared
from tests.mlx_backend.layer_rows import LONG, ROWS, Rows, in_pieces, use_cpu_attention


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_a_chunk_of_a_row_that_shares_its_prefix_is_bit_by_bit_what_it_is_whole(bits, num_tokens):
    rows, (slot, _, _) = Rows(ROWS[:1], kv_bits=bits), ROWS[0]
    queries = mx.random.normal((1, 4, num_tokens, 64))
    keys, values = mx.random.normal((2, 1, 2, num_tokens, 64))
    outs = []
    for layer, prefix in ((rows.shared, LONG), (rows.whole, None)):
        rows.decode(layer, shared=prefix is not None)  # for the tokens before
        cache = PrefillCache(layer, slot, 76, prefix)
        handle, _ = cache.update_and_fetch(keys, values)
        outs.append(np.array(handle.cache.attend(queries, rows.scale, cache.make_mask(num_tokens), None)))
        assert cache.offset == 76 + num_tokens
    assert (outs[0] == outs[1]).all()


@pytest.mark.parametrize(("bits", "sinks"), [(None, False), (None, True), (8, False)])
@pytest.mark.parametrize("window", [None, 20])
def test_a_chunk_with_too_many_scores_is_attended_to_in_parts(monkeypatch, bits, sinks, window):
    rows, (slot, _, _) = Rows(ROWS[:1], kv_bits=bits, key_width=96, value_width=96), ROWS[0]
    queries = mx.random.normal((1, 4, 9, 96))
    keys, values = mx.random.normal((2, 1, 2, 9, 96))
    extra = mx.random.normal((4,)) if sinks else None
    calls, outs, whole = [], [], prefill_cache.mlx_lm_attention
    monkeypatch.setattr(prefill_cache, "mlx_lm_attention", lambda q, *rest: calls.append(q.shape[2]) or whole(q, *rest))
    for most in (1 << 20, 4 * 85 * 4, 1):
        monkeypatch.setattr(device, "MAX_SCORES", most)
        rows.decode(rows.shared, shared=True)  # for the tokens before
        cache = PrefillCache(rows.shared, slot, 76, LONG)
        mask = cache.make_mask(9, window_size=window)
        handle, _ = cache.update_and_fetch(keys, values)
        outs.append(np.array(handle.cache.attend(queries, rows.scale, mask, extra)))
    assert calls == [9, 4, 4, 1, *[1] * 9]
    assert all(np.abs(out - outs[0]).max() < 1e-6 for out in outs[1:])


def test_a_chunk_that_a_kernel_attends_to_is_never_parted(monkeypatch):
    monkeypatch.setattr(device, "MAX_SCORES", 1)
    queries = mx.zeros((1, 4, 9, 64))
    assert PrefillCache(FullLayer(None), ROWS[0][0], 76).queries_at_once(queries) == 9
    assert PrefillCache(FullLayer(KvBits(8, 32)), ROWS[0][0], 76).queries_at_once(queries) == 1


@pytest.mark.usefixtures("cpu_ways")
@pytest.mark.parametrize("window", [None, 20])
def test_a_chunk_on_a_cpu_reads_a_shared_prefix_where_it_lies(monkeypatch, window):
    prefix, slot = SharedPrefix(1, 4096), Slot(Slab(0, 64, 1), 0)
    layer = FullLayer(None)
    layer.prefixes[1] = tuple([mx.random.normal((1, 2, 4096, 64))] for _ in range(2))
    queries, keys, values = (mx.random.normal((1, h, 8, 64)) for h in (4, 2, 2))
    mx.eval(layer.prefixes, queries, keys, values)

    def attend():
        cache = PrefillCache(layer, slot, 4096, prefix)
        mask = cache.make_mask(8, window_size=window)
        handle, _ = cache.update_and_fetch(keys, values)
        return np.array(handle.cache.attend(queries, 0.125, mask, None))

    expected = attend()
    use_cpu_attention(monkeypatch)
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
    caches = [
        PrefillCache(layer, slot, num_shared(prefix) + n, prefix) for slot, prefix, n in (ROWS[i] for i in picked)
    ]
    passes = [(PrefillBatchCache(caches, SIZES), slice(0, 4))] if together else []
    passes = passes or [(cache, slice(i, i + 1)) for i, cache in enumerate(caches)]
    outs = []
    for cache, some in passes:
        longest = max(SIZES[some])
        mask = cache.make_mask(longest, window_size=window)
        handle, _ = cache.update_and_fetch(keys[some, :, :longest], values[some, :, :longest])
        outs.append(handle.cache.attend(queries[some, :, :longest], rows.scale, mask, None))
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
def test_chunks_read_in_one_pass_differ_by_rounding_alone_on_a_cpu(monkeypatch, picked):
    queries, keys, values = (mx.random.normal((4, h, 12, 64)) for h in (4, 2, 2))
    alone = read(Rows(), picked, False, queries, keys, values)
    use_cpu_attention(monkeypatch)
    for piece in (100, 1000, 1 << 19):
        in_pieces(monkeypatch, piece)
        for one, other in zip(alone, read(Rows(), picked, True, queries, keys, values), strict=True):
            assert np.abs(one - other).max() < 1e-6


@pytest.mark.parametrize("of", ["queries", "keys", "values"])
def test_a_chunk_whose_numbers_are_none_spoils_no_other_of_its_pass_on_a_cpu(cpu_attention, of):
    tensors = {name: mx.random.normal((4, h, 12, 64)) for name, h in (("queries", 4), ("keys", 2), ("values", 2))}
    fine = read(Rows(), (0, 1, 4, 5), True, **tensors)
    tensors[of][2] = mx.nan
    broken = read(Rows(), (0, 1, 4, 5), True, **tensors)
    assert np.isnan(broken[2]).all()
    assert all((broken[i] == fine[i]).all() for i in (0, 1, 3))
