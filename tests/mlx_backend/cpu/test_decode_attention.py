"""Decoding by a CPU's arithmetic beside MLX's own attention."""

import mlx.core as mx
import pytest

from mlx_mcp.mlx_backend import device
from tests.mlx_backend.layer_rows import SCALES


@pytest.mark.parametrize("heads", [8, 4, 2])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("sinks", [None, 2.0])
def test_decoding_is_what_mlx_computes(cpu_attention, heads, rows, sinks):
    mx.random.seed(2)
    q, k, v = (mx.random.normal((rows, h, n, 64)) for h, n in ((heads, 1), (2, 90), (2, 90)))
    sinks = None if sinks is None else mx.random.normal((heads,)) * sinks
    mask = (mx.arange(90) < mx.random.randint(1, 90, (rows, 1)))[:, None, None]
    for scale, bound in SCALES:
        for m in (mask, None):
            expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=m, sinks=sinks)
            assert mx.abs(device.decode_attention(q, k, v, scale, m, sinks) - expected).max() < bound
