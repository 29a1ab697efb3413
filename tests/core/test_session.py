"""Sessions: whose they are, what they keep, and when they end; without an engine."""

import pytest

from mlx_mcp.core.origin import Origin
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.errors import CapacityError, InvalidRequest, SessionBusy, UnknownSession
from tests.core.house import House, words


def test_a_session_is_found_by_its_own_tenant_alone():
    house = House()
    session = house.open(words(20), name="notes")
    assert house.store.get("ann", "notes") is house.store.get("ann", session.session_id) is session
    for asked in ("notes", session.session_id):
        with pytest.raises(
            UnknownSession, match="list_sessions shows yours; create_session, or generate with keep=true"
        ):
            house.store.get("bob", asked)


def test_a_name_is_free_again_when_its_session_ends():
    house = House()
    session = house.open(words(20), name="notes")
    with pytest.raises(InvalidRequest, match="There is a session named 'notes' already"):
        house.open(words(20), name="notes")
    house.store.close(session)
    house.open(words(20), name="notes")


def test_a_session_ends_when_it_was_left_alone_for_longer_than_its_time():
    house = House()
    short, usual = house.open(words(20), ttl_s=5), house.open(words(20, "A"))
    house.now = 5.0
    assert house.store.expired() == []
    house.now = 5.1
    assert house.store.expired() == [short]
    house.store.use(short)
    assert house.store.expired() == []
    house.now = 60.1
    assert house.store.expired() == [short, usual]


def test_a_session_in_the_midst_of_a_turn_does_not_end():
    house = House()
    session = house.open(words(20))
    house.now = 61.0
    house.store.begin(session, 99)
    house.now = 200.0
    assert house.store.expired() == []
    house.store.abandon(session)
    house.store.begin(session, 100)  # that of the next turn, which has waited
    house.now = 400.0
    assert house.store.expired() == []


def test_a_turn_that_came_to_nothing_leaves_the_session_as_it_was():
    house = House()
    session = house.open(words(20))
    before = session.log, session.leaf, session.after
    house.store.begin(session, 99)
    house.store.abandon(session)
    assert (session.log, session.leaf, session.after, session.turn) == (*before, None)
    new = house.store.open("ann", "tiny", SessionOptions(), (), 100)
    house.store.abandon(new)
    assert list(house.store.sessions) == [session.session_id]


def test_the_blocks_of_a_pinned_session_stay_until_it_ends_or_goes_on():
    house = House()
    session, other = house.open(words(20), pinned=True), house.open(words(20, "A"))
    assert house.store.references == [session.leaf]
    assert house.pool.reclaim(house.pool.used_bytes - house.pool.protected_bytes)
    assert (session.leaf.resident, other.leaf.resident) == (True, False)
    house.store.close(session)
    house.check()
    assert house.pool.protected_bytes == 0
    assert house.pool.reclaim(house.pool.used_bytes)


def test_pins_take_half_of_all_memory_at_most():
    house = House(limit_bytes=600)
    pinned = [house.open(words(119, first), pinned=True).options.pinned for first in "aAP"]
    assert pinned == [True, True, False]
    assert house.pool.protected_bytes == 2 * (119 + 3 + 2)  # with the logits after their prompts


def test_a_fork_goes_on_from_its_parents_block_and_is_not_pinned():
    house = House()
    parent = house.open(words(22), pinned=True)
    before = house.ledger.used_bytes
    one, other = house.store.fork(parent, 2, ("a", "b"))
    assert one.log is other.log is parent.log
    assert one.leaf is other.leaf is parent.leaf
    assert (parent.leaf.num_sessions, house.ledger.used_bytes) == (3, before)
    assert house.store.references == [parent.leaf]
    house.store.close(parent)
    house.check()
    assert one.leaf.resident


def test_a_block_that_counts_a_session_too_many_is_a_bug_that_shows():
    house = House()
    session = house.open(words(20))
    house.pool.add_session(session.leaf.parent)
    with pytest.raises(AssertionError, match="blocks miscount their sessions"):
        house.store.check_integrity()


def test_a_name_that_outlives_its_session_is_a_bug_that_shows():
    house = House()
    session = house.open(words(20), name="notes")
    house.store.names.ids["ann", "old"] = session.session_id
    with pytest.raises(AssertionError, match="the names are not the sessions'"):
        house.store.check_integrity()


def test_an_ephemeral_session_takes_with_it_what_nobody_else_goes_on_from():
    house = House()
    house.open(words(8) + "zzzz")
    kept = house.pool.num_blocks
    session = house.open(words(24), ephemeral=True)
    assert house.pool.num_blocks > kept
    house.store.close(session)
    assert house.pool.num_blocks == kept


def test_what_has_no_finished_turn_cannot_be_forked_and_there_are_so_many_and_no_more():
    house = House()
    with pytest.raises(SessionBusy, match="cannot be used now: its context is still being computed"):
        house.store.fork(house.store.open("ann", "tiny", SessionOptions(), (), 1), 1, ())
    parent = house.open(words(20))
    house.store.fork(parent, 49, ())
    house.store.fork(parent, 49, ())
    with pytest.raises(CapacityError, match="There are 100 sessions, and may be 100"):
        house.store.fork(parent, 1, ())


def test_a_fork_has_its_parents_turns_so_far_and_neither_has_the_others_later_ones():
    house = House()
    parent = house.store.open("ann", "tiny", SessionOptions(), (), 1)
    house.store.finish(parent, (1, 2), None, "user", Origin("ann", 1.0))
    (child,) = house.store.fork(parent, 1, ())
    assert child.origins is parent.origins, "shared, however many there are"
    house.store.finish(parent, (1, 2, 3), None, "assistant", Origin("ann", 2.0))
    house.store.finish(child, (1, 2, 4), None, "assistant", Origin("bob", 3.0))
    assert parent.origins == (Origin("ann", 1.0, 0), Origin("ann", 2.0, 2))
    assert child.origins == (Origin("ann", 1.0, 0), Origin("bob", 3.0, 2))
    house.check()


def test_a_turn_that_begins_where_its_session_has_ended_is_a_bug_that_shows():
    house = House()
    session = house.open(words(20))
    session.origins = (Origin("ann", 1.0, len(session.log)),)
    with pytest.raises(AssertionError, match="begin where it has none"):
        house.store.check_integrity()
