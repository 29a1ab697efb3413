"""Pretended devices of 8 to 512 GB, and models of 1 to 400 GB: what fits is served, what does not is refused."""

import pytest

from mlx_mcp.core.memory import (
    MIN_TOKENS,
    DeviceMemory,
    MemorySettings,
    budget_for,
    fitting_weights,
    fixed_budget,
    lack_of_tokens,
)

GB = 10**9
WORKING_SETS = {8: 5.3, 16: 11.4, 24: 17.2, 64: 48, 128: 115.4, 512: 464}  # what Macs of so many GB recommend
WEIGHTS = (1, 4, 8, 13, 35, 70, 140, 240, 400)


def mac(size):
    return DeviceMemory("metal", int(WORKING_SETS[size] * GB), 499_000)


@pytest.mark.parametrize("size", WORKING_SETS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_passes_cache_keys_and_values_never_exceed_the_working_set(size, weights):
    budget, passes = budget_for(MemorySettings(), mac(size)), GB // 4
    taken = weights * GB + passes
    if taken > budget.max_weights_bytes:
        return
    kv = budget.kv_bytes(taken)
    assert kv >= budget.ceiling_bytes // 16
    assert taken + budget.cache_bytes + kv <= budget.ceiling_bytes < WORKING_SETS[size] * GB


@pytest.mark.parametrize(("size", "largest"), [(8, 4), (16, 8), (24, 13), (64, 35), (128, 70), (512, 400)])
def test_the_largest_model_that_is_served_on_each_device(size, largest):
    budget = budget_for(MemorySettings(), mac(size))
    assert max(each for each in WEIGHTS if each * GB + GB // 4 <= budget.max_weights_bytes) == largest


def test_keys_and_values_have_all_that_is_left_beside_the_weights():
    budget = budget_for(MemorySettings(), mac(64))
    assert budget.kv_bytes(4 * GB) - budget.kv_bytes(20 * GB) == 16 * GB
    assert budget.kv_bytes(4 * GB) > 35 * GB
    assert budget.kv_bytes(100 * GB) == 0


def test_what_a_user_sets_holds_within_the_ceiling():
    its = MemorySettings(max_memory_bytes=10 * GB, max_kv_bytes=GB)
    budget = budget_for(its, mac(64))
    assert budget.ceiling_bytes == 10 * GB
    assert budget.kv_bytes(4 * GB) == GB
    assert budget.kv_bytes(9 * GB) < GB
    assert budget_for(MemorySettings(max_memory_bytes=900 * GB), mac(64)).ceiling_bytes < 48 * GB


def test_after_a_death_the_ceiling_is_smaller_and_never_less_than_half():
    whole, less, least = (
        budget_for(MemorySettings(share=share), mac(16)).ceiling_bytes for share in (1.0, 0.875, 0.01)
    )
    assert less == pytest.approx(0.875 * whole, rel=1e-6)
    assert least == pytest.approx(0.5 * whole, rel=1e-6)


def test_a_cpu_has_no_ceiling_and_the_shares_that_it_always_had():
    device = DeviceMemory("cpu", 64 * GB)
    budget = budget_for(MemorySettings(), device)
    assert budget == fixed_budget(MemorySettings(), 64 * GB)
    assert (budget.ceiling_bytes, budget.max_weights_bytes, budget.kv_bytes(0)) == (None, 40 * GB, 8 * GB)
    assert budget.kv_bytes(30 * GB) == 8 * GB
    assert budget_for(MemorySettings(max_memory_bytes=GB), device).ceiling_bytes == GB


def test_cached_blocks_stay_far_below_the_number_of_buffers_that_metal_allows():
    assert budget_for(MemorySettings(), mac(512)).max_blocks * 4 <= 499_000 // 2
    assert budget_for(MemorySettings(), DeviceMemory("cuda", 80 * GB)).max_blocks is None


def test_says_in_which_bits_a_model_that_is_too_large_would_fit():
    assert "in 8 bits takes about 74.4 GB" in fitting_weights(140 * GB, 16, 100 * GB)
    assert "in 4 bits takes about 39.4 GB" in fitting_weights(140 * GB, 16, 48 * GB)
    assert fitting_weights(140 * GB, 16, 20 * GB) == ""
    assert fitting_weights(40 * GB, 4.5, 20 * GB) == ""


def test_says_how_many_tokens_have_room_and_what_fewer_bits_would_give():
    assert lack_of_tokens(MIN_TOKENS * 1000, 1000, 0, None) is None
    lacking = lack_of_tokens(300 * 1000, 1000, 0, None)
    assert "room for 300 tokens" in lacking
    assert "kv_bits = 8 gives room for about 564" in lacking
    assert "kv_bits" not in lack_of_tokens(300 * 1000, 1000, 0, 4)
    assert lack_of_tokens(0, 0, 0, None) is None  # a model of states alone


def test_the_words_name_every_share():
    words = budget_for(MemorySettings(), mac(16)).words
    assert words == (
        "memory: 10.7 GB in all, of these at most 9.4 GB for weights and passes, 0.7 GB for MLX's cache, the rest "
        "for keys and values"
    )
