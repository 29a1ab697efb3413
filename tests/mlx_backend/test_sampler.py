import math
from collections import Counter

import mlx.core as mx
import pytest

from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.mlx_backend.sampler import next_token, nucleus

PROBS = [0.5, 0.3, 0.15, 0.05]
LOGITS = mx.log(mx.array(PROBS))


def draw(count, **params):
    params = SamplingParams(1, **params)
    return Counter(next_token(LOGITS, params, index).item() for index in range(count))


def test_temperature_zero_takes_the_likeliest():
    assert draw(20, temperature=0.0, seed=1) == {0: 20}


def test_draws_follow_the_probabilities():
    count = 4000
    drawn = draw(count, temperature=1.0, seed=5)
    for token, p in enumerate(PROBS):
        assert abs(drawn[token] / count - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_a_low_temperature_sharpens():
    cold, warm = draw(500, temperature=0.3, seed=1), draw(500, temperature=3.0, seed=1)
    assert cold[0] > 400 > 300 > warm[0]


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {0}), (0.5, {0}), (0.51, {0, 1}), (0.9, {0, 1, 2}), (1e-9, {0})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    assert {i for i, x in enumerate(nucleus(LOGITS, top_p).tolist()) if x > -math.inf} == kept


def test_top_p_works_on_logits_in_any_order_and_with_ties():
    shuffled = mx.log(mx.array([0.05, 0.5, 0.15, 0.15, 0.15]))
    assert {i for i, x in enumerate(nucleus(shuffled, 0.6).tolist()) if x > -math.inf} == {1, 2, 3, 4}


def test_a_seed_gives_the_same_draws_and_another_gives_others():
    def text(seed):
        params = SamplingParams(1, temperature=1.0, seed=seed)
        return [next_token(LOGITS, params, i).item() for i in range(50)]

    assert text(7) == text(7)
    assert text(7) != text(8)
    assert text(0) != text(1)
