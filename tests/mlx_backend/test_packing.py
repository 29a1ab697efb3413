"""Payloads as bytes and back: the same to the bit, whatever they are stored as."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlx_mcp.core.layout import CacheKind, Form, LayerCache, Tensor
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
    full = LayerCache(CacheKind.FULL)

    def form(*tensors, layers=(full,)):
        return Form(layers, tuple(Tensor(*tensor) for tensor in tensors))

    keys, values = ("layers.0.keys", "F32", (2, 1, 8)), ("layers.0.values", "F32", (2, 1, 8))
    block = StoredBlock(b"k", b"p", 0, (1,), 1, True, form(keys, values), (memoryview(bytes(128)),))
    assert codec.unpack(block)().nbytes == 128
    for other in (
        form(),
        form(keys),
        form(values, keys),
        form(keys, values, layers=(full, full)),
        form(keys, values, layers=(LayerCache(CacheKind.FULL, 0, 64, 8),)),
        form(keys, values, ("layers.0.state.0", "F32", (2,))),
        form((keys[0], "F64", (2, 1, 4)), (values[0], "F64", (2, 1, 4))),
        form((keys[0], "BF16", (2, 1, 16)), (values[0], "BF16", (2, 1, 16))),
        form((keys[0], "BF16", (2, 2, 8)), (values[0], "BF16", (2, 2, 8))),
        form((keys[0], "F32", (2, 2, 4)), (values[0], "F32", (2, 2, 4))),
        form((keys[0], "F32", (2, 2, 8)), (values[0], "F32", (2, 2, 8))),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            codec.unpack(replace(block, form=other))


def test_a_block_without_the_states_that_it_says_it_has_is_refused():
    caches = [KVCache(), ArraysCache(1)]
    caches[0].update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)))
    caches[1][0] = mx.zeros((1, 4))
    codec = Codec(caches, None, False)
    kept = {0: [mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8))], 1: [mx.zeros((1, 4))]}
    for state in (True, False):
        payload = codec.cut(lambda i: kept[i], 0, 1, state)
        block = StoredBlock(b"k", b"p", 0, (1,), 0, payload.has_state, *payload.pack())
        assert codec.unpack(block)().has_state == state
        with pytest.raises(ValueError, match="a block of another layout, or with other states"):
            codec.unpack(replace(block, has_state=not state))
        with pytest.raises(ValueError, match="other bytes than are described"):
            codec.unpack(replace(block, data=(*block.data, memoryview(b"x"))))


def test_tensors_are_named_by_layer_and_part():
    caches = [KVCache(), ArraysCache(2), RotatingKVCache(16)]
    for cache in (caches[0], caches[2]):
        cache.update_and_fetch(mx.zeros((1, 2, 1, 64)), mx.zeros((1, 2, 1, 64)))
    caches[1][0], caches[1][1] = mx.zeros((1, 4)), mx.zeros((1, 5))
    codec = Codec(caches, KvBits(8, 32), False)
    names = [name for stack in (*codec.full, *codec.windows, *codec.states) for name in stack.names]
    parts = [f"layers.0.{part}{of}" for of in ("", ".scales", ".biases") for part in ("keys", "values")]
    assert sorted(names) == sorted([*parts, "layers.1.state.0", "layers.1.state.1", "layers.2.keys", "layers.2.values"])
    assert codec.layers[0] == LayerCache(CacheKind.FULL, 0, 32, 8)
    assert codec.layers[1:] == (LayerCache(CacheKind.STATE), LayerCache(CacheKind.WINDOW, 16))
