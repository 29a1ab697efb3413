"""Attention of chunks by numpy beside MLX's own."""

import time

import mlx.core as mx
import numpy as np
import pytest

from mlx_mcp.mlx_backend.cpu import chunk_attention as module
from mlx_mcp.mlx_backend.cpu.chunk_attention import chunk_attention, pool, run_on_threads, tiles
from tests.mlx_backend.layer_rows import SCALES, in_pieces


@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("piece", [60, pytest.param(3000, marks=pytest.mark.slow), 1 << 19])
@pytest.mark.parametrize(("chunk", "before"), [(1, 40), pytest.param(40, 0, marks=pytest.mark.slow), (37, 3), (9, 700)])
@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_chunk_is_what_mlx_computes(monkeypatch, heads, piece, chunk, before, window, sinks, rows):
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
        got = chunk_attention(q, prefix, (own_k, own_v), of_last[None], scale, sinks)
        assert mx.abs(got - expected).max() < bound


def test_a_chunk_whose_scores_are_more_than_the_buffer_has_gets_memory_of_its_own():
    q, k, v = (mx.random.normal((1, h, n, 4)) for h, n in ((1, 64), (1, 20_000), (1, 20_000)))
    assert module.BUFFER_SCORES < 64 * 20_000
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5)
    assert mx.abs(chunk_attention(q, None, (k, v), None, 0.5, None) - expected).max() < 1e-6


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("chunk", "heads"), [(1, 2), (29, 8), (128, 2)])
def test_a_chunk_is_the_same_to_a_rounding_however_many_threads_share_it(monkeypatch, threads, rows, chunk, heads):
    mx.random.seed(4)
    q, k, v = (mx.random.normal((rows, h, n, 64)) for h, n in ((heads, chunk), (2, 300), (2, 300)))
    prefix = tuple(mx.random.normal((1, 2, 200, 64)) for _ in range(2))
    alone = chunk_attention(q, prefix, (k, v), "causal", 0.125, None)
    monkeypatch.setattr(module, "num_threads", lambda: threads)
    monkeypatch.setattr(module, "MIN_THREAD_SCORES", 1)
    pool.cache_clear()
    todo = tiles(rows, 2, chunk, heads // 2, 500, threads)
    assert len(todo) >= min(threads, rows * 2 * chunk), "some of the threads have nothing to do"
    shared = chunk_attention(q, prefix, (k, v), "causal", 0.125, None)
    pool.cache_clear()
    assert mx.abs(shared - alone).max() < 2e-6


@pytest.mark.parametrize("broken", [0, 1])
def test_work_that_fails_on_one_thread_fails_once_the_others_have_ended(monkeypatch, broken):
    monkeypatch.setattr(module, "num_threads", lambda: 3)
    pool.cache_clear()
    ended = []

    def work(thread):
        if thread == broken:
            raise ZeroDivisionError
        time.sleep(0.05)
        ended.append(thread)

    with pytest.raises(ZeroDivisionError):
        run_on_threads(3, work)
    pool.cache_clear()
    assert sorted(ended) == [thread for thread in range(3) if thread != broken]


@pytest.mark.parametrize("number", [mx.nan, mx.inf, -mx.nan])
def test_a_key_that_is_no_number_spoils_the_queries_that_attend_to_it(number):
    q, k, v = (mx.random.normal((1, h, n, 16)) for h, n in ((2, 30), (1, 60), (1, 60)))
    q, k[0, 0, 45] = mx.abs(q), number
    mask = mx.arange(60) <= mx.arange(30, 60)[:, None]  # the queries from the 15th on attend to that key
    out = chunk_attention(q, None, (k, v), mask[None], 0.25, None)
    assert mx.isnan(out[:, :, 15:]).all()


def test_a_query_whose_numbers_are_none_spoils_no_other_of_its_chunk(cpu_attention):
    queries, keys, values = (mx.random.normal((1, h, 20, 64)) for h in (4, 2, 2))
    causal = mx.tri(20)[None] > 0
    fine = chunk_attention(queries, None, (keys, values), causal, 0.125, None)
    queries[:, :, 7] = mx.nan
    broken = chunk_attention(queries, None, (keys, values), causal, 0.125, None)
    assert mx.isnan(broken[:, :, 7]).all()
    assert (np.delete(np.array(broken), 7, 2) == np.delete(np.array(fine), 7, 2)).all()
