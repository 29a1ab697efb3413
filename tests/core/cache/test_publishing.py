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


@pytest.mark.parametrize(
    "layout", [Layout(sharing=True), Layout(states=True), Layout(windows=(5,))], ids=["full", "states", "windows"]
)
def test_a_prompt_that_comes_again_for_one_token_is_neither_restored_nor_copied_once_more(layout):
    house = House(layout=layout)
    house.say(words(30), max_tokens=1)
    before, steps, cuts = house.pool.used_bytes, [], []
    house.runner.cut = lambda *cut: cuts.append(cut)
    for max_tokens in (1, 2):
        again = house.add(words(30), max_tokens=max_tokens)
        steps.append(house.scheduler.schedule())
        assert again.num_cached == 30
        house.scheduler.abandon(steps[-1])
        house.remove(again)
    (nothing,), (all_of_it,) = (step.restores for step in steps)
    assert (nothing.parts, nothing.num_tokens) == ((), 0)
    assert (len(all_of_it.parts), all_of_it.num_tokens) == (8, 30)
    assert house.say(words(30), max_tokens=1).output_ids
    assert not cuts
    assert house.pool.used_bytes == before


def test_a_prompt_that_comes_again_and_ends_within_a_block_gets_a_block_of_its_own():
    house = House()
    house.say(words(30), max_tokens=3)  # its last block goes on after the prompt
    before = house.pool.used_bytes
    session = house.open(words(30), max_tokens=1)
    assert session.leaf.end == 30
    assert house.pool.used_bytes == before + 2


def test_what_a_session_that_leaves_no_trace_computed_is_no_secret_once_another_says_it():
    house = House()
    house.say(words(30), max_tokens=1, ephemeral=True)
    (root,) = house.pool.roots.values()
    blocks = [root]
    while blocks[-1].children:
        blocks += blocks[-1].children.values()
    assert all(block.private for block in blocks[1:])
    house.say(words(30), max_tokens=1)
    assert not any(block.private for block in blocks[1:])


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
