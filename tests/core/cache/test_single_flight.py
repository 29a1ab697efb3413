"""What several sequences need is computed once, and the others wait for it."""

import pytest

from tests.core.house import House, words


def test_who_needs_a_prefix_that_another_computes_waits_for_it():
    house = House()
    one, other = house.add(words(40) + "x"), house.add(words(40) + "y")
    house.step()
    assert other.slot is None
    house.run()
    assert (one.num_cached, other.num_cached) == (0, 40)
    assert house.runner.num_computed == 41 + 1 + 2 * 2


def test_who_waits_goes_on_by_itself_when_the_one_that_computed_is_gone():
    house = House()
    one, other = house.add(words(40) + "x"), house.add(words(40) + "y")
    house.step()
    assert house.cache.single_flight.is_waiting(other)
    house.remove(one)
    assert not house.cache.single_flight.is_waiting(other)
    house.run()
    assert len(other.output_ids) == 3


def test_a_user_of_a_prefix_that_is_gone_is_a_bug_that_shows():
    house = House()
    s = house.add(words(40))
    house.cache.single_flight.users.subtract(house.cache.tracks[s].prompt_hashes)
    with pytest.raises(AssertionError, match="users are miscounted"):
        house.check()
