"""Payloads as bytes and back: the same to the bit, whatever they are stored as."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.mlx_backend.layers import Codec
from mlx_mcp.mlx_backend.slabs import FullLayer, KvBits


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_a_payload_that_was_bytes_for_a_while_is_the_same_to_the_bit(dtype, kv_bits):
    caches = [KVCache(), KVCache()]
    for cache in caches:
        cache.update_and_fetch(*(mx.random.normal((1, 2, 1, 64)).astype(dtype) for _ in "kv"))
    bits = None if kv_bits is None else KvBits(kv_bits, 64)
    codec, layer = Codec(caches, bits, False), FullLayer(bits)
    kept = {
        i: [*layer.encode(rows()), *layer.encode(rows())] for i in range(2) for rows in [lambda: random_rows(dtype)]
    }
    payload = codec.cut(lambda i: kept[i], 0, 5, False)
    form, data = payload.pack()
    assert sum(view.nbytes for view in data) == payload.nbytes
    copies = tuple(memoryview(bytes(view)) for view in data)
    stored = StoredBlock(b"k", b"p", 0, (1, 2, 3, 4, 5), payload.window_start, payload.has_state, form, copies)
    again = codec.unpack(stored)()
    assert again.nbytes == payload.nbytes
    for one, other in zip(payload.arrays, again.arrays, strict=True):
        assert one.dtype == other.dtype
        assert mx.array_equal(one.view(mx.uint8), other.view(mx.uint8))


def random_rows(dtype):
    return mx.random.normal((1, 2, 5, 64)).astype(dtype)


def test_bytes_of_another_layout_are_refused():
    caches = [KVCache()]
    caches[0].update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)))
    codec = Codec(caches, None, False)
    good = '[[["float32", 2, 2, 1, 8]], [], []]'
    block = StoredBlock(b"k", b"p", 0, (1,), 1, True, good, (memoryview(bytes(128)),))
    assert codec.unpack(block)().nbytes == 128
    for form in (
        "[[], [], []]",
        '[[["float64", 2, 2, 1, 4]], [], []]',
        '[[["float32", 2, 2, 1, 4]], [], []]',
        "{}",
        "x",
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            codec.unpack(replace(block, form=form))
    with pytest.raises(ValueError, match="states"):
        codec.unpack(replace(block, has_state=False))
