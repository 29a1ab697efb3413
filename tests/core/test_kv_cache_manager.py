"""What sequences begin with and leave behind, to the reference and the byte, without an engine."""

import random

import pytest

from mlx_mcp.core.kv_cache_manager import Sharing
from mlx_mcp.core.layout import Layout
from mlx_mcp.core.miss import MissReason
from mlx_mcp.core.ports import StoredBlock, TierEntry
from mlx_mcp.core.scheduler import Limits
from tests.core.house import House, words
from tests.fakes import FakePayload


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


def test_who_needs_a_prefix_that_another_computes_waits_for_it():
    house = House()
    one, other = house.add(words(40) + "x"), house.add(words(40) + "y")
    house.step()
    assert other.slot is None
    house.run()
    assert (one.num_cached, other.num_cached) == (0, 40)
    assert house.runner.num_computed == 41 + 1 + 2 * 2


def test_a_block_that_a_row_is_restored_from_stays_until_the_row_has_it():
    house = House(limit_bytes=400)
    house.say(words(60), max_tokens=1)
    again = house.add(words(60) + "zz", max_tokens=1)
    step = house.scheduler.schedule()
    (kept,) = house.cache.references
    assert kept.end == 60
    assert not house.pool.reclaim(house.pool.used_bytes)
    house.runner.launch(step)
    house.cache.launched()
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


def test_states_go_on_only_from_the_moment_they_were_kept_at():
    house = House(layout=Layout(states=True))
    house.say(words(30), max_tokens=1)
    assert house.say(words(30) + "zz").num_cached in (16, 24, 30)  # a chunk's end or the row's
    assert house.say(words(21) + "zz").num_cached % 8 == 0


def test_a_row_whose_states_are_of_another_moment_leaves_no_tail():
    house = House(layout=Layout(states=True))
    s = house.add(words(13), max_tokens=9)
    while len(s.output_ids) < 4:
        house.step()
    before = house.pool.used_bytes
    assert house.cache.finish(s, None, exact=False) is None
    assert house.pool.used_bytes == before
    house.remove(s)


def test_an_evicted_prefix_is_computed_again_and_says_so():
    house = House()
    house.say(words(40), max_tokens=1)
    assert house.pool.reclaim(house.pool.used_bytes)
    again = house.say(words(40), max_tokens=1)
    assert (again.num_cached, again.miss.reason) == (0, MissReason.EVICTED)


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


# From a tier


def stored(house, tokens, start, parent_key, tenant="ann"):
    key = house.prefixes.key(parent_key, tokens)
    return StoredBlock(key, parent_key, start, tokens, start, True, "letters", (b"",))


def on_its_way(house, text, tenant="ann"):
    """A sequence that waits for blocks, and what a tier has of its prompt."""
    s = house.add(text, tenant)
    house.cache.fetch(s)
    key, blocks = house.cache.root(tenant).key, []
    for start in range(0, len(text) - 4, 4):
        tokens = s.prompt_ids[start : start + 4]
        blocks.append((stored(house, tokens, start, key), FakePayload(tokens, start, True)))
        key = blocks[-1][0].key
    return s, blocks


def test_a_sequence_waits_for_what_a_tier_brings_and_begins_with_it():
    house = House()
    s, blocks = on_its_way(house, words(22))
    house.step()
    assert s.slot is None
    house.cache.arrived(s, blocks)
    house.run()
    assert (s.num_cached, s.num_restored) == (20, 20)


def test_blocks_of_other_tokens_or_of_another_place_are_not_taken_from_a_tier():
    for spoil in ("tokens", "parent", "start"):
        house = House()
        s, blocks = on_its_way(house, words(22))
        good, _ = blocks[2]
        other = tuple(reversed(good.tokens))
        fields = {"tokens": (other, good.start, good.parent), "parent": (good.tokens, good.start, b"another")}
        fields["start"] = (good.tokens, 12, good.parent)
        tokens, start, parent = fields[spoil]
        blocks[2] = (stored(house, tokens, start, parent), FakePayload(tokens, start, True))
        house.cache.arrived(s, blocks)
        assert house.pool.num_blocks == 2
        house.run()
        assert s.num_cached == 8


def test_a_tier_is_asked_for_whole_blocks_and_never_for_the_last_token():
    house = House()
    s, blocks = on_its_way(house, words(24))
    there = {block.key: TierEntry(4, 0, True) for block, _ in blocks}
    there[house.prefixes.key(blocks[-1][0].key, s.prompt_ids[20:24])] = TierEntry(4, 0, True)
    assert [(w.start, w.end) for w in house.cache.wanted(s, there.get)] == [(i, i + 4) for i in range(0, 20, 4)]
    house.cache.arrived(s, [])
    house.run()


def test_what_a_tier_brings_for_one_who_is_gone_is_there_for_others():
    house = House()
    s, blocks = on_its_way(house, words(22))
    house.remove(s)
    house.cache.arrived(s, blocks)
    house.check()
    assert house.say(words(22)).num_cached == 20


# Everything at once


def events(house, rng):
    """What may happen next, as functions; each leaves sequences and sessions as they are found in the house."""
    text = rng.choice("aAP")
    prompt = words(rng.choice([3, 9, 16, 33, 120]), text) + rng.choice(["", "x", "yz"])
    tenant = rng.choice(["ann", "bob"])
    live = [*house.scheduler.running, *(s for queue in house.scheduler.waiting.values() for s in queue)]
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
