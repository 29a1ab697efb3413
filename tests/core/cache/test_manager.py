"""What sequences begin with and leave behind, to the reference and the byte, without an engine."""

import random

import pytest

from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.layout import Layout
from mlx_mcp.core.scheduler import Limits
from tests.core.house import House, words


def test_a_prompt_that_comes_again_computes_nothing_but_its_last_token():
    house = House()
    first = house.say(words(30), max_tokens=1)
    again = house.say(words(29), max_tokens=1)
    assert (first.num_cached, again.num_cached) == (0, 28)


def test_two_tenants_begin_with_nothing_of_each_other():
    house = House()
    house.say(words(30), "ann")
    assert house.say(words(30), "bob").num_cached == 0
    assert house.say(words(30), "ann").num_cached == 30


@pytest.mark.parametrize("other", [(b"other", 8), (b"tiny", 16)], ids=["another model", "other chunks"])
def test_what_was_computed_otherwise_is_no_hit(other):
    house = House()
    house.say(words(30))
    house.with_model(*other)
    assert house.say(words(30)).num_cached == 0


def test_the_same_block_after_another_prefix_has_another_hash_and_another_key():
    house = House()
    house.say("aaaa" + "zzzz" + "q")
    house.say("bbbb" + "zzzz" + "q")
    (root,) = house.pool.roots.values()
    one, other = (next(iter(block.children.values())) for block in root.children.values())
    assert one.tokens == other.tokens == tuple(map(ord, "zzzz"))
    assert one.hash != other.hash
    assert one.key != other.key


def test_a_block_that_a_row_is_restored_from_stays_until_the_row_has_it():
    house = House(limit_bytes=400)
    house.say(words(60), max_tokens=1)
    again = house.add(words(60) + "zz", max_tokens=1)
    step = house.scheduler.schedule()
    (kept,) = house.cache.references
    assert kept.end == 60
    assert not house.pool.reclaim(house.pool.used_bytes)
    house.runner.launch(step)
    house.cache.release_restored()
    assert house.pool.reclaim(house.pool.used_bytes)
    house.remove(again)


def test_a_reference_that_nobody_holds_is_a_bug_that_shows():
    house = House()
    leaf = house.open(words(20)).leaf
    house.pool.acquire(leaf)
    with pytest.raises(AssertionError, match="1 references to a block at 20, 0 held"):
        house.check()
    house.pool.release(leaf)
    house.check()


def test_states_go_on_only_from_the_moment_they_were_kept_at():
    house = House(layout=Layout(states=True))
    house.say(words(30), max_tokens=1)
    assert house.say(words(30) + "zz").num_cached in (16, 24, 30)  # a chunk's end or the row's
    assert house.say(words(21) + "zz").num_cached % 8 == 0


def test_what_is_left_after_a_cached_prefix_is_cut_where_it_would_be_anyway():
    house = House()
    house.say(words(20), max_tokens=1)
    house.add(words(20) + words(20, "A"), max_tokens=1)
    chunks = [(c.start, c.end) for _ in range(2) for c in house.step().prefill]
    assert chunks == [(20, 24), (24, 32), (32, 40)]


@pytest.mark.parametrize("num_output", [5, 7])
def test_a_preempted_sequence_begins_again_with_what_was_kept_of_it_and_no_token_later(num_output):
    house = House()
    s = house.add(words(30), max_tokens=20)
    while len(s.output_ids) < num_output:
        house.step()
    house.scheduler.preempt_all()
    house.runner.reset()
    step = house.scheduler.schedule()
    (restore,) = step.restores
    assert restore.num_tokens == s.num_computed == (32 if num_output == 5 else 36)
    house.scheduler.abandon(step)
    house.run()
    assert "".join(map(chr, s.output_ids)) == words(30)[:20]


# Everything at once


def events(house, rng):
    """What may happen next, as functions; each leaves sequences and sessions as they are found in the house."""
    text = rng.choice("aAP")
    prompt = words(rng.choice([3, 9, 16, 33, 120]), text) + rng.choice(["", "x", "yz"])
    tenant = rng.choice(["ann", "bob"])
    live = [*house.scheduler.running, *house.scheduler.waiting]
    idle = [session for session in house.store.sessions.values() if session.turn is None]
    yield lambda: house.add(prompt, tenant, rng.choice([1, 4, 30]), group=tenant, ephemeral=rng.random() < 0.2)
    yield house.step
    yield house.step
    yield lambda: house.pool.reclaim(int(rng.random() * (house.pool.used_bytes - house.pool.protected_bytes)))
    if live:
        yield lambda: house.remove(rng.choice(live))
    if len(house.store.sessions) < 12:
        yield lambda: house.begin(prompt, tenant, pinned=rng.random() < 0.5, ephemeral=rng.random() < 0.3)
    if idle:
        yield lambda: house.store.fork(rng.choice(idle), 2, ())
        yield lambda: house.store.close(rng.choice(idle))
        yield lambda: house.store.shorten(rng.choice(idle), rng.randrange(1, 40))


@pytest.mark.parametrize("limit_bytes", [1 << 30, 700], ids=["roomy", "tight"])
@pytest.mark.parametrize("layout", [Layout(sharing=True), Layout(states=True)], ids=["tokens", "states"])
def test_whatever_comes_and_goes_every_reference_and_byte_is_somebodys(layout, limit_bytes):
    house = House(limit_bytes, layout, Sharing(2, 8), Limits(3, 50, 8, 16, 8))
    rng = random.Random(1)
    for _ in range(400):
        rng.choice(list(events(house, rng)))()
        house.check()
    for session in [session for session in house.store.sessions.values() if session.turn is None]:
        house.store.close(session)  # else pins may take the room of what waits
        house.check()
    house.run()
    assert house.pool.num_evictions > 20
    for session in list(house.store.sessions.values()):
        house.store.close(session)
        house.check()
    assert house.pool.protected_bytes == 0
    assert house.pool.reclaim(house.pool.used_bytes)
    assert house.ledger.used_bytes == 0
