"""Powers of two, and the softmax made of them, beside numpy and MLX."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mcp.mlx_backend.cpu import exp2
from mlx_mcp.mlx_backend.softmax import MLX


def test_a_power_of_two_is_right_to_the_last_bits():
    x = -np.concatenate([np.arange(0, 126, 2**-9), np.random.default_rng(0).exponential(9, 100_000)])
    x = np.maximum(x, -126).astype(np.float32)
    expected = np.exp2(x.astype(np.float64))
    assert np.abs(np.array(exp2.exp2(mx.array(x))) / expected - 1).max() < 3e-7


def test_what_is_masked_gets_no_weight_at_all():
    assert exp2.exp2(mx.array([-127.0, -1000.0, -exp2.MASK_PENALTY, -mx.inf])).tolist() == [0, 0, 0, 0]
    assert exp2.exp2(mx.array([0.0, -1.0, -126.0])).tolist() == [1, 0.5, 2**-126]
    assert np.isnan(exp2.exp2(mx.array(mx.nan)))


@pytest.mark.parametrize("spread", [0.1, 1, 80])
@pytest.mark.parametrize("sizes", [[1], [7], [513], [2000, 3], [5, 1100, 40]])
@pytest.mark.parametrize("sinks", [None, mx.array([0.5, -90.0, 90.0])])
def test_weights_to_the_base_of_two_are_those_of_a_softmax(spread, sizes, sinks):
    mx.random.seed(1)
    scores = [mx.random.uniform(-spread, spread, (2, 1, 3, size)) for size in sizes]
    masks = [mx.random.uniform(shape=(2, 1, 1, size)) < 0.8 for size in sizes]
    masks[0][..., 0] = True
    expected, _ = MLX.weigh(scores, masks, sinks)
    weights, total = exp2.weigh([part * exp2.BASE_2.factor for part in scores], masks, sinks)
    for mine, theirs, mask in zip(weights, expected, masks, strict=True):
        assert mx.abs(mine / total - theirs).max() < 1e-6
        assert mx.where(mask, 0, mine).max() == 0


@pytest.mark.parametrize("number", [mx.nan, mx.inf, -mx.nan])
def test_a_score_that_is_no_number_spoils_its_own_row(number):
    scores = mx.random.normal((1, 1, 4, 700))
    fine, _ = exp2.weigh([scores], [None], None)
    scores[0, 0, 2, 33] = number
    weights, total = exp2.weigh([scores[..., :500], scores[..., 500:]], [None, None], None)
    assert np.isnan(total.flatten().tolist()).tolist() == [False, False, True, False]
    assert mx.array_equal(mx.concatenate(weights, -1)[:, :, [0, 1, 3]], fine[0][:, :, [0, 1, 3]])
