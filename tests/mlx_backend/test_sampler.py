import math
import random
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.mlx_backend.sampler import Row, _adjust, _first_above, draw, on_host, sample, uniform
from tests import effort

NAMESPACES = pytest.mark.parametrize("xp", [np, mx], ids=["numpy", "mlx"])
PROBS = [0.5, 0.3, 0.15, 0.05]


def row(index=0, prompt=(), output=(), mask=None, **params):
    return Row(SamplingParams(1, **params), index, prompt, output, mask)


def log(probs, copies=1):
    return mx.log(mx.array([probs] * copies))


def drawn(logits, rows):
    return [choice.token_id for choice in draw(logits, rows).read()]


def counts(probs, num_draws, **params):
    return Counter(drawn(log(probs, num_draws), [row(i, **params) for i in range(num_draws)]))


def mask_of(*token_ids, num_bytes=1):
    bits = sum(1 << token for token in token_ids)
    return bits.to_bytes(num_bytes, "little")


# Greedy


def test_temperature_zero_takes_the_likeliest_and_of_several_the_lowest_id():
    logits = mx.array([[0.0, 1, 5, 2], [3, 7, 7, 7], [-1, -2, -3, -4]])
    assert drawn(logits, [row(seed=i) for i in range(3)]) == [2, 1, 0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_every_float_type_is_drawn_from(dtype):
    logits = mx.array([[0.0, 9, 0], [0, 0, 9]]).astype(dtype)
    assert drawn(logits, [row(), row(temperature=0.1, top_p=0.9)]) == [1, 2]


def test_a_greedy_batch_is_not_evaluated_before_it_is_read():
    rows = [row(), row(logit_bias=((3, 100.0),)), row(repetition_penalty=2.0, prompt=[1]), row(logprobs=1)]
    lazy = mx.zeros((len(rows), 100_000)) + 1
    before = mx.get_active_memory()
    result = draw(lazy, rows)
    assert mx.get_active_memory() - before < 10_000
    assert [choice.token_id for choice in result.read()] == [0, 3, 0, 0]


def test_sampling_in_mlx_is_not_evaluated_before_it_is_read():
    lazy = mx.zeros((2, 100_000)) + 1
    before = mx.get_active_memory()
    tokens = sample(lazy, [row(temperature=1.0, top_p=0.5), row(temperature=1.0)], mx)
    assert mx.get_active_memory() - before < 10_000
    assert tokens.shape == (2,)


def test_tokens_feed_the_next_step_before_they_are_read():
    result = draw(log(PROBS, 2), [row(), row(temperature=1.0, seed=1)])
    embedded = mx.arange(4)[result.tokens]
    mx.eval(embedded, result.arrays())
    assert embedded.tolist() == [choice.token_id for choice in result.read()]


# Sampling


def test_draws_follow_the_probabilities():
    num_draws = 4000
    found = counts(PROBS, num_draws, temperature=1.0, seed=5)
    for token, p in enumerate(PROBS):
        assert abs(found[token] / num_draws - p) < 5 * math.sqrt(p * (1 - p) / num_draws)


def test_a_low_temperature_sharpens():
    cold, warm = counts(PROBS, 500, temperature=0.3, seed=1), counts(PROBS, 500, temperature=3.0, seed=1)
    assert cold[0] > 400 > 300 > warm[0]


def test_the_lowest_temperature_there_is_takes_the_likeliest():
    assert counts(PROBS[::-1], 20, temperature=5e-324) == {3: 20}


@NAMESPACES
def test_the_lowest_top_p_there_is_takes_the_likeliest(xp):
    logits = xp.array([[0.0] * 500 + [1.0] + [0.0] * 200] * 20)
    assert set(sample(logits, [row(i, temperature=1.0, top_p=5e-324) for i in range(20)], xp).tolist()) == {500}


@pytest.mark.parametrize(
    ("probs", "params", "kept"),
    [
        (PROBS, {"top_p": 0.4}, {0}),
        (PROBS, {"top_p": 0.51}, {0, 1}),
        (PROBS, {"top_p": 0.9}, {0, 1, 2}),
        (PROBS, {"top_p": 1e-9}, {0}),
        ([0.05, 0.5, 0.15, 0.15, 0.15], {"top_p": 0.6}, {1, 2, 3, 4}),  # ties with the last kept
        (PROBS, {"top_k": 1}, {0}),
        (PROBS, {"top_k": 3}, {0, 1, 2}),
        (PROBS, {"top_k": 9}, {0, 1, 2, 3}),
        ([0.1, 0.4, 0.25, 0.25], {"top_k": 2}, {1, 2, 3}),
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.5}, {0}),  # 0.4 of the 0.7 that top_k left
        (PROBS, {"min_p": 0.25}, {0, 1, 2}),
        (PROBS, {"min_p": 1.0}, {0}),
        ([0.4, 0.4, 0.2], {"min_p": 1.0}, {0, 1}),
        (PROBS, {"top_k": 3, "top_p": 0.99, "min_p": 0.5}, {0, 1}),
    ],
)
def test_what_is_kept(probs, params, kept):
    assert set(counts(probs, 300, temperature=1.0, seed=2, **params)) == kept


def plausible(logits, row, slack=1e-5):
    """The tokens that exact arithmetic, with its limits moved by `slack`, may draw: in plain Python."""
    p, u = row.params, uniform(row.params.seed, row.index)
    weights = [math.exp((x - max(logits)) / p.temperature) for x in logits]
    likeliest = sorted(range(len(logits)), key=lambda i: -logits[i])
    kth = logits[likeliest[min(p.top_k or len(logits), len(logits)) - 1]]
    of_top_k = [i for i in likeliest if logits[i] >= kth]
    found = set()
    for top_p in (p.top_p - slack, p.top_p + slack):
        so_far, nucleus = 0.0, []
        for i in of_top_k:
            if nucleus and so_far >= top_p * sum(weights[j] for j in of_top_k) and logits[i] < logits[nucleus[-1]]:
                break
            nucleus.append(i)
            so_far += weights[i]
        for min_p in (p.min_p * (1 - slack), p.min_p * (1 + slack)):
            kept = sorted(i for i in nucleus if weights[i] >= min(min_p, 1.0))
            total, so_far = sum(weights[i] for i in kept), 0.0
            for i in kept:
                if (so_far / total) - slack <= u <= (so_far + weights[i]) / total + slack:
                    found.add(i)
                so_far += weights[i]
    return found


@st.composite
def batches(draw):
    """Logits [rows, vocab], coarse enough for ties, and rows whose parameters differ."""
    vocab = draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale, step = draw(st.sampled_from([0.1, 1, 5, 20])), draw(st.sampled_from([1e-6, 0.01, 0.5]))
    rows = draw(
        st.lists(
            st.builds(
                row,
                st.integers(0, 2**20),
                temperature=st.floats(0.05, 5),
                top_k=st.integers(0, vocab + 3),
                top_p=st.just(1.0) | st.floats(0.01, 1),
                min_p=st.just(0.0) | st.floats(0, 1),
                seed=st.integers(0, 2**63),
            ),
            min_size=1,
            max_size=4,
        )
    )
    logits = np.round(rng.normal(size=(len(rows), vocab)) * scale / step) * step
    return logits.astype(np.float32), rows


@NAMESPACES
@settings(max_examples=effort.drawn(400), deadline=None)
@given(batches())
def test_sampling_agrees_with_exact_arithmetic(xp, batch):
    logits, rows = batch
    tokens = sample(xp.array(logits), rows, xp).tolist()
    for token, one, of in zip(tokens, logits.astype(np.float64).tolist(), rows, strict=True):
        assert token in plausible(one, of)


def test_numpy_and_mlx_draw_the_same():
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(64, 5000)) * 4).astype(np.float32)
    rows = [row(i, temperature=1.1, top_p=[0.3, 0.95, 1.0][i % 3], top_k=i % 5 * 20, seed=i) for i in range(64)]
    assert sample(logits, rows, np).tolist() == sample(mx.array(logits), rows, mx).tolist()


@NAMESPACES
@settings(max_examples=effort.drawn(400), deadline=None)
@given(
    st.lists(st.just(0.0) | st.floats(2**-100, 1, width=32), min_size=1, max_size=400),
    st.integers(0, 399),
    st.floats(0, 1 - 2**-24, width=32) | st.just(1 - 2**-24),
)
def test_a_token_without_probability_is_never_drawn(xp, weights, likeliest, fraction):
    weights[likeliest % len(weights)] = 1.0
    place = _first_above(xp.array([weights], dtype=xp.float32), xp.array([[fraction]], dtype=xp.float32), xp).item()
    assert weights[place] > 0
    slack = 1e-5 * sum(weights)
    assert sum(weights[:place]) - slack <= fraction * sum(weights) <= sum(weights[: place + 1]) + slack


def test_a_seed_gives_the_same_draws_and_another_gives_others():
    def text(seed):
        return drawn(log(PROBS, 50), [row(i, temperature=1.0, seed=seed) for i in range(50)])

    assert text(7) == text(7)
    assert text(7) != text(8)
    assert text(0) != text(1)


def test_the_numbers_that_decide_are_the_same_in_every_release():
    numbers = [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(2**63, 5)]
    assert [x * 2**24 for x in numbers] == [15924901, 2768143, 14990030, 2440663]


def test_the_numbers_that_decide_are_even_and_exact_in_float32():
    numbers = np.array([uniform(seed, index) for seed in range(20) for index in range(500)])
    assert (numbers == numbers.astype(np.float32)).all()
    assert 0 <= numbers.min() < 0.001 < 0.999 < numbers.max() < 1
    tenths = np.bincount((numbers * 10).astype(int), minlength=10)
    assert abs(tenths - 1000).max() < 150


# Company


def mixed_rows(vocab):
    rng = random.Random(4)
    prompt = [rng.randrange(vocab) for _ in range(50)]
    mask = bytes(rng.randrange(256) for _ in range((vocab + 7) // 8))
    kinds = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.5, "top_k": 100, "min_p": 0.01},
        {"temperature": 1.0, "top_k": 40, "mask": mask},
        {"mask": mask, "logprobs": 0},
        {"temperature": 3.0, "repetition_penalty": 1.3, "prompt": prompt, "logprobs": 3},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "output": prompt},
        {"temperature": 2.0, "logit_bias": ((5, 3.0), (9, -100.0)), "logprobs": 5},
    ]
    return [row(i, seed=i, **kind) for i, kind in enumerate(kinds * 3)]


@pytest.mark.parametrize("vocab", [100, 1003, 1024])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_row_gets_alone_what_it_gets_in_any_company(vocab, dtype):
    rows = mixed_rows(vocab)
    logits = (mx.random.normal((len(rows), vocab), key=mx.random.key(1)) * 2).astype(dtype)
    alone = [draw(logits[i : i + 1], [rows[i]]).read()[0] for i in range(len(rows))]
    rng = random.Random(5)
    for size in (2, 3, 8, len(rows)):
        for _ in range(5):
            chosen = rng.sample(range(len(rows)), size)
            assert draw(logits[mx.array(chosen)], [rows[i] for i in chosen]).read() == [alone[i] for i in chosen]


@NAMESPACES
def test_a_limit_falls_on_the_same_bit_in_any_company(xp):
    # Every draw is at a border: a single bit in a sum would move it.
    rng = np.random.default_rng(6)
    weights = rng.random((16, 777), dtype=np.float32)
    places = rng.integers(0, 777, 16)
    sums = np.cumsum(weights, axis=-1)
    fractions = (sums[np.arange(16), places] / sums[:, -1])[:, None]

    def reach(at):
        return _first_above(xp.array(weights[at]), xp.array(fractions[at]), xp).tolist()

    alone = [reach([i])[0] for i in range(16)]
    for size in (2, 5, 16):
        chosen = rng.permutation(16)[:size].tolist()
        assert reach(chosen) == [alone[i] for i in chosen]


# Penalties, biases and masks


@settings(max_examples=effort.drawn(200), deadline=None)
@given(st.data())
def test_penalties_and_biases_change_what_they_name(data):
    vocab = data.draw(st.integers(1, 20))
    ids = st.lists(st.integers(0, vocab - 1), max_size=30)
    some = st.floats(-2, 2, width=32)
    rows = data.draw(
        st.lists(
            st.builds(
                row,
                prompt=ids,
                output=ids,
                repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
                presence_penalty=st.just(0.0) | some,
                frequency_penalty=st.just(0.0) | some,
                logit_bias=st.dictionaries(st.integers(0, vocab - 1), some).map(lambda bias: tuple(bias.items())),
            ),
            min_size=1,
            max_size=5,
        )
    )
    logits = np.random.default_rng(0).normal(size=(len(rows), vocab)).astype(np.float32)
    expected = logits.astype(np.float64)
    for at, of in enumerate(rows):
        for token in range(vocab):
            x, p, times = expected[at, token], of.params, list(of.output_ids).count(token)
            if token in [*of.prompt_ids, *of.output_ids]:
                x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
            x -= p.presence_penalty * (times > 0) + p.frequency_penalty * times
            expected[at, token] = x + dict(p.logit_bias).get(token, 0)
    given_logits = mx.array(logits)
    np.testing.assert_allclose(np.array(_adjust(given_logits, rows)), expected, atol=1e-4)
    assert (np.array(given_logits) == logits).all()


def test_a_token_is_penalised_once_for_its_presence_and_for_every_time_that_it_came():
    logits = mx.array([[3.0, 1.0]] * 4)
    output = (0, 0, 0)
    penalties = [{}, {"presence_penalty": 1.9}, {"frequency_penalty": 0.6}, {"frequency_penalty": 0.7}]
    assert drawn(logits, [row(output=output, **penalty) for penalty in penalties]) == [0, 0, 0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_bans_and_forces(temperature):
    assert drawn(log(PROBS), [row(logit_bias=((3, 100.0),), temperature=temperature)]) == [3]
    banned = counts(PROBS, 100, logit_bias=((0, -100.0), (2, -100.0), (3, -100.0)), temperature=temperature)
    assert banned == {1: 100}


def test_a_bias_on_a_token_that_the_model_lacks_changes_nothing():
    assert drawn(log(PROBS), [row(logit_bias=((4, 100.0), (-1, 100.0)))]) == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_allows_only_its_tokens(temperature):
    assert set(counts(PROBS, 100, mask=mask_of(1, 3), temperature=temperature)) <= {1, 3}
    assert counts(PROBS, 100, mask=mask_of(3), temperature=temperature, top_p=0.5, top_k=2) == {3: 100}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_may_be_longer_or_shorter_than_the_vocabulary(temperature):
    logits = mx.arange(12, dtype=mx.float32)[None]
    longer = mask_of(2, 13, 90, num_bytes=20)
    assert drawn(logits, [row(mask=longer, temperature=temperature)]) == [2]
    assert drawn(logits, [row(mask=mask_of(7), temperature=temperature * 0.1)]) == [7]


@pytest.mark.parametrize("mask", [b"", bytes(1), mask_of(5), bytes(9)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_that_allows_nothing_gives_no_token(mask, temperature):
    rows = [row(), row(mask=mask, temperature=temperature, top_p=0.9, logprobs=1), row(mask=mask_of(2))]
    assert drawn(log(PROBS, 3), rows) == [0, None, 2]


# Broken logits


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_p": 0.9}, {"mask": mask_of(0)}], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_row_with_nan_or_infinity_gets_no_token_and_the_others_do(bad, params, dtype):
    logits = mx.zeros((3, 300))
    logits[1, 200] = bad
    logits[:, 0] = 50
    result = draw(logits.astype(dtype), [row(**params), row(logprobs=2, **params), row()])
    assert [choice.token_id for choice in result.read()] == [0, None, 0]
    assert result.read()[1].logprobs is None
    assert result.tokens[1].item() < 300


@pytest.mark.parametrize(("dtype", "large"), [(mx.float16, 65504), (mx.bfloat16, 3e38), (mx.float32, 3e38)], ids=str)
def test_large_logits_are_not_taken_for_infinities(dtype, large):
    logits = mx.full((2, 300), large, dtype=dtype)
    logits[:, 0] = -large
    assert drawn(logits, [row(), row(temperature=1.0, mask=mask_of(7))]) == [1, 7]


# Log-probabilities


def test_logprobs_are_of_the_unchanged_logits_likeliest_first():
    shuffled = [0.05, 0.5, 0.15, 0.3]
    changed = {"temperature": 0.2, "top_k": 1, "logit_bias": ((0, 100.0),)}
    rows = [row(), row(logprobs=0), row(logprobs=2), row(logprobs=9), row(logprobs=3, **changed)]
    none, chosen, two, every, other = (choice.logprobs for choice in draw(log(shuffled, 5) + 3, rows).read())
    assert none is None
    assert chosen.logprob == pytest.approx(math.log(0.5), abs=1e-6)
    assert chosen.top == ()
    assert [token for token, _ in two.top] == [1, 3]
    assert [token for token, _ in every.top] == [1, 3, 2, 0]
    assert [math.exp(x) for _, x in every.top] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-6)
    assert other.logprob == pytest.approx(math.log(0.05), abs=1e-6)
    assert other.top == every.top[:3]


def test_of_equal_logprobs_the_lower_id_comes_first():
    (choice,) = draw(mx.array([[1.0, 2, 0, 2] * 100]), [row(logprobs=250)]).read()
    assert [token for token, _ in choice.logprobs.top] == [*range(1, 400, 2), *range(0, 200, 4)]


# Running ahead


@pytest.mark.usefixtures("cpu_ways")
def test_only_what_needs_the_host_keeps_a_step_from_running_ahead():
    assert not on_host(SamplingParams(1))
    assert not on_host(SamplingParams(1, logit_bias=((1, 2.0),), logprobs=5, top_p=0.5))
    for penalty in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}):
        assert on_host(SamplingParams(1, **penalty))
    assert on_host(SamplingParams(1, temperature=0.5)) == (mx.default_device() == mx.cpu)
