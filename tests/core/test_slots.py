import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mcp.core.slots import CPU_SLABS, KvCost, Ledger, SlotPool


def pool(limit_bytes=1 << 30, **cost):
    return SlotPool(Ledger(limit_bytes), KvCost(**({"token_bytes": 1} | cost)))


def place(slot):
    return slot.slab.slab_id, slot.index


def test_capacities_grow_with_the_row_and_waste_little_of_a_long_one():
    wanted = [1, 128, 129, 512, 513, 2048, 2049, 4096, 8192, 8193, 100_000]
    assert [CPU_SLABS.capacity_for(n) for n in wanted] == [
        128,
        128,
        256,
        512,
        768,
        2048,
        2560,
        4096,
        8192,
        9216,
        106_496,
    ]


@given(st.integers(1, 1 << 20))
def test_a_capacity_is_enough_and_its_own_class(num_tokens):
    capacity = CPU_SLABS.capacity_for(num_tokens)
    assert num_tokens <= capacity <= max(128, 2 * num_tokens)
    assert CPU_SLABS.capacity_for(capacity) == capacity


def test_rows_of_one_class_share_a_slab_and_others_do_not():
    p = pool()
    assert [place(p.take(n)) for n in (5, 128, 200, 60, 2000, 2000, 9000)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (0, 2),
        (2, 0),
        (3, 0),
        (4, 0),
    ]
    assert [slab.num_slots for slab in p.slabs.values()] == [8, 4, 1, 1, 1]


def test_a_class_doubles_as_it_fills():
    p = pool()
    for _ in range(17):
        p.take(200)
    assert [slab.num_slots for slab in p.slabs.values()] == [4, 4, 8, 16]


def test_a_freed_slot_is_taken_again_and_a_slab_goes_with_its_last_row():
    p = pool()
    first, second = p.take(100), p.take(100)
    p.give_back(first)
    assert p.take(100) == first
    p.give_back(first)
    p.give_back(second)
    assert (p.slabs, p.used_bytes, p.ledger.used_bytes) == ({}, 0, 0)


def test_the_fullest_slab_is_filled_first_so_that_others_can_go():
    p = pool()
    slots = [p.take(200) for _ in range(5)]  # a full slab of four, and one in the next
    p.give_back(slots[2])
    assert place(p.take(200)) == (0, 2)


def test_a_slot_is_freed_once():
    p = pool()
    slot, _ = p.take(100), p.take(100)
    p.give_back(slot)
    with pytest.raises(AssertionError, match="double free"):
        p.give_back(slot)


@pytest.mark.parametrize(("slots_of_memory", "num_slots"), [(16, 1), (32, 2), (47, 2), (1000, 8)])
def test_a_slab_of_several_slots_takes_at_most_a_sixteenth_of_memory(slots_of_memory, num_slots):
    assert pool(limit_bytes=128 * slots_of_memory).take(100).slab.num_slots == num_slots


def test_not_one_byte_goes_past_the_limit():
    p = pool(limit_bytes=300)
    assert p.take(100) is not None
    assert p.take(100) is not None
    assert p.ledger.used_bytes == 256
    assert p.take(100) is None
    assert p.ledger.used_bytes == 256


def test_windows_and_states_are_counted_with_their_bounds():
    cost = KvCost(token_bytes=10, windows=((64, 3), (1000, 1)), state_bytes=7)
    assert cost.row_bytes(128) == 128 * 10 + 64 * 3 + 128 + 7
    assert pool(token_bytes=10, state_bytes=7).alone_bytes(3) == 1287


def test_padded_rows_are_charged_as_much_as_the_longest_each():
    p = pool(limit_bytes=5000, padded=True)
    short = [p.take(100), p.take(100)]
    assert p.ledger.used_bytes == 2 * 128
    long = p.take(1000)
    assert p.ledger.used_bytes == 3 * 1024
    assert p.take(1500) is None  # four times 1536
    p.give_back(long)
    assert p.ledger.used_bytes == 2 * 128
    for slot in short:
        p.give_back(slot)
    assert p.ledger.used_bytes == 0


def test_two_models_share_one_ledger():
    ledger = Ledger(2048)
    a, b = SlotPool(ledger, KvCost(1)), SlotPool(ledger, KvCost(1))
    slot = a.take(1500)
    assert b.take(1500) is None
    a.give_back(slot)
    assert b.take(1500) is not None


@given(
    st.lists(st.one_of(st.integers(1, 3000), st.integers(-20, -1)), max_size=60),
    st.integers(100, 20_000),
    st.booleans(),
)
def test_slots_held_and_slots_free_always_add_up(orders, limit_bytes, padded):
    p, held = pool(limit_bytes=limit_bytes, padded=padded), []
    for order in orders:  # take so many tokens, or give the n-th of the held back
        if order > 0:
            slot = p.take(order)
            if slot is None:
                assert padded or p.used_bytes + p.alone_bytes(order) > limit_bytes
            else:
                assert slot.capacity >= order
                held.append(slot)
        elif held:
            p.give_back(held.pop(order % len(held)))
        p.check_integrity(held)
        p.ledger.check_integrity(p.used_bytes)
    for slot in held:
        p.give_back(slot)
    assert p.ledger.used_bytes == 0
