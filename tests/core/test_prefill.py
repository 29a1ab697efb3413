"""How many tokens of prompts go into a step: by the device, by what is set, and by the time that steps take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mcp.core.prefill import CPU_PREFILL, GPU_PREFILL, Prefill, PrefillBudget, PrefillOptions
from mlx_mcp.core.scheduler import Limits


def test_what_is_not_set_is_as_the_device_likes_it():
    assert PrefillOptions().on(CPU_PREFILL) == CPU_PREFILL
    assert PrefillOptions().on(GPU_PREFILL) == GPU_PREFILL


def test_a_budget_that_is_set_stays_whatever_steps_take():
    assert PrefillOptions(busy_tokens=1024).on(GPU_PREFILL) == Prefill(512, 2048, 1024, None)


def test_chunks_follow_a_budget_that_is_smaller_and_budgets_follow_chunks_that_are_larger():
    assert PrefillOptions(busy_tokens=128).on(GPU_PREFILL) == Prefill(128, 2048, 128, None)
    assert PrefillOptions(chunk_tokens=4096).on(GPU_PREFILL) == Prefill(4096, 4096, 4096, 0.15)
    assert PrefillOptions(chunk_tokens=1024).on(CPU_PREFILL) == Prefill(1024, 1024, 1024, None)


@given(
    st.sampled_from([CPU_PREFILL, GPU_PREFILL]),
    st.none() | st.integers(1, 64).map(lambda n: 64 * n),
    st.none() | st.integers(128, 9000),
    st.none() | st.integers(128, 9000),
)
def test_every_choice_is_one_that_a_scheduler_takes(device, chunk, idle, busy):
    lowest = chunk or 128
    if any(tokens is not None and tokens < lowest for tokens in (idle, busy)):
        return  # refused where settings are read
    Limits().reading(PrefillOptions(chunk, idle, busy).on(device))


def steps(budget, per_token_s, decode_s=0.02, num=20):
    """The budget after steps that are filled, and the time that the last of them took."""
    for _ in range(num):
        seconds = decode_s + per_token_s * budget.tokens
        budget.measure(budget.tokens, seconds)
    return budget.tokens, decode_s + per_token_s * budget.tokens


@pytest.mark.parametrize("per_token_s", [1e-5, 5e-5, 1e-4, 2e-4, 1e-3])
def test_others_wait_no_longer_than_is_said_where_a_chunk_is_no_longer(per_token_s):
    tokens, seconds = steps(PrefillBudget(512, 512, 2048, 0.15), per_token_s)
    assert tokens % 512 == 0
    assert seconds <= 0.15 or tokens == 512
    larger = seconds + 512 * per_token_s
    assert larger > 0.15 or tokens == 2048, "there was time for one chunk more"


def test_a_step_that_took_too_long_makes_the_next_ones_smaller_at_once():
    budget = PrefillBudget(2048, 128, 2048, 0.1)
    budget.measure(2048, 0.8)
    assert budget.tokens == 256


def test_one_quick_step_no_more_than_doubles_the_budget():
    budget = PrefillBudget(512, 512, 4096, 0.15)
    budget.measure(512, 0.001)
    assert budget.tokens == 1024


def test_a_short_rest_of_a_prompt_says_nothing_of_how_long_many_tokens_take():
    budget = PrefillBudget(1024, 512, 2048, 0.15)
    budget.measure(20, 0.1)
    assert budget.tokens == 1024


def test_a_clock_that_stands_and_a_budget_that_is_fixed_change_nothing():
    for budget in (PrefillBudget(512, 512, 2048, None), PrefillBudget(512, 512, 2048, 0.15)):
        budget.measure(512, 0.0)
        assert budget.tokens == 512
    fixed = PrefillBudget(512, 512, 2048, None)
    fixed.measure(512, 9.0)
    assert fixed.tokens == 512
