"""What a tier has of a prompt is put where it belongs, or nowhere."""

import pytest

from mlx_mcp.core.cache.prefixes import block_key
from mlx_mcp.core.ports import StoredBlock, TierEntry
from tests.core.house import House, words
from tests.fakes import FakePayload, letters_of


def stored(house, tokens, start, parent_key, tenant="ann"):
    key = block_key(parent_key, tokens)
    return StoredBlock(key, parent_key, start, tokens, start, True, letters_of(0), (b"",))


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
    house.cache.add_restored(s, blocks)
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
        house.cache.add_restored(s, blocks)
        assert house.pool.num_blocks == 2
        house.run()
        assert s.num_cached == 8


def test_a_tier_is_asked_for_whole_blocks_and_never_for_the_last_token():
    house = House()
    s, blocks = on_its_way(house, words(24))
    there = {block.key: TierEntry(4, 0, True) for block, _ in blocks}
    there[block_key(blocks[-1][0].key, s.prompt_ids[20:24])] = TierEntry(4, 0, True)
    assert [(w.start, w.end) for w in house.cache.wanted(s, there.get)] == [(i, i + 4) for i in range(0, 20, 4)]
    house.cache.add_restored(s, [])
    house.run()


def test_what_a_tier_brings_for_one_who_is_gone_is_there_for_others():
    house = House()
    s, blocks = on_its_way(house, words(22))
    house.remove(s)
    house.cache.add_restored(s, blocks)
    house.check()
    assert house.say(words(22)).num_cached == 20


def test_one_who_waits_for_a_tier_though_it_is_gone_is_a_bug_that_shows():
    house = House()
    s, _ = on_its_way(house, words(22))
    house.remove(s)
    house.cache.fetch(s)
    with pytest.raises(AssertionError, match="a sequence that is gone waits for a tier"):
        house.check()
