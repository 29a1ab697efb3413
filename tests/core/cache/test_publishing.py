"""What rows compute becomes blocks, charged to the byte."""

import pytest

from mlx_mcp.core.layout import Layout
from tests.core.house import House, words


def test_logits_that_no_block_takes_are_given_back():
    house = House()
    s = house.add(words(30), max_tokens=5)
    while not s.output_ids:
        house.step()
    assert house.cache.booked_bytes == 3
    house.remove(s)
    assert house.cache.booked_bytes == 0


def test_a_cancelled_sequence_leaves_whole_blocks_and_nothing_else():
    house = House()
    s = house.add(words(30))
    house.step()
    house.remove(s)
    assert house.ledger.used_bytes == house.pool.used_bytes == 16


def test_a_row_whose_states_are_of_another_moment_leaves_no_tail():
    house = House(layout=Layout(states=True))
    s = house.add(words(13), max_tokens=9)
    while len(s.output_ids) < 4:
        house.step()
    before = house.pool.used_bytes
    assert house.cache.finish(s, None, exact=False) is None
    assert house.pool.used_bytes == before
    house.remove(s)


def test_a_sequence_that_is_published_though_it_does_not_run_is_a_bug_that_shows():
    house = House()
    s = house.add(words(30))
    house.step()
    house.cache.publishing.stop(s)
    with pytest.raises(AssertionError, match="is published that does not run, or one is not"):
        house.check()
