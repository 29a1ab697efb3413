"""Rows that begin alike have one copy of that, and every byte of it is on the ledger."""

import pytest

from mlx_mcp.core.cache.shared_prefixes import Sharing
from tests.core.house import House, words


def test_rows_that_share_a_prefix_give_it_back_with_the_last_of_them():
    house = House(sharing=Sharing(2, 8))
    house.say(words(40), max_tokens=1)
    rows = [house.add(words(40) + chr(65 + i) * 3, max_tokens=5) for i in range(3)]
    house.step()
    assert {s.num_shared for s in rows} == {40}
    assert house.cache.booked_bytes >= 40
    house.run()
    assert house.cache.booked_bytes == 0
    assert house.ledger.used_bytes == house.pool.used_bytes


def test_a_row_more_than_there_are_is_a_bug_that_shows():
    house = House(sharing=Sharing(2, 8))
    house.say(words(40), max_tokens=1)
    rows = [house.add(words(40) + chr(65 + i) * 3, max_tokens=5) for i in range(3)]
    house.step()
    house.cache.shared.num_rows[rows[0].prefix] += 1
    with pytest.raises(AssertionError, match="rows of shared prefixes are miscounted"):
        house.check()
