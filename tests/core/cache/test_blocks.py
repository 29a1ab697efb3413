"""Blocks: who holds what, which goes first, and every byte."""

import random
from dataclasses import dataclass

import pytest

from mlx_mcp.core.cache.blocks import BlockPool
from mlx_mcp.core.layout import PromptEnd
from mlx_mcp.core.slots import Ledger
from tests.fakes import FakeLogits


@dataclass(frozen=True)
class Payload:
    nbytes: int = 10
    window_start: int = 0
    has_state: bool = True


class Tree:
    """A pool of blocks named by letters, each of 4 tokens and 10 bytes."""

    def __init__(self, limit_bytes=1000):
        self.ledger = Ledger(limit_bytes)
        self.pool = BlockPool(self.ledger, block_tokens=4)
        self.root = self.pool.root(b"root", b"root")
        self.blocks = {}

    def add(self, name, parent=None, num_tokens=4):
        after = self.blocks[parent] if parent else self.root
        if not self.ledger.charge(10):
            return None
        tokens = tuple(ord(name) for _ in range(num_tokens))
        self.blocks[name] = self.pool.add(after, name.encode(), tokens, Payload())
        return self.blocks[name]

    def chain(self, names):
        for parent, name in zip(" " + names[:-1], names, strict=True):
            self.add(name, parent.strip() or None)
        return self.blocks[names[-1]]

    @property
    def order(self):
        names = {block: name for name, block in self.blocks.items()}
        return "".join(names[block] for block in self.pool.eviction_order())


def test_evicts_the_latest_tokens_before_those_they_come_after():
    tree = Tree()
    tree.chain("abc")
    assert tree.order == "cba"


def test_of_two_branches_the_one_unused_for_longer_goes_first_and_the_stem_last():
    tree = Tree()
    tree.chain("ab")
    tree.add("c", "b")
    tree.add("d", "c")
    tree.add("x", "b")
    assert tree.order == "dcxba"
    tree.pool.touch(tree.blocks["d"])
    assert tree.order == "xdcba"
    tree.pool.check_integrity()


def test_the_use_of_a_branch_counts_for_its_stem():
    tree = Tree()
    tree.chain("ab")
    tree.add("m")
    tree.pool.touch(tree.blocks["b"])
    assert tree.order == "mba"
    tree.pool.drop(tree.blocks["b"])
    assert tree.order == "ma"


def test_what_the_pool_says_will_go_is_what_goes():
    rng = random.Random(3)
    tree = Tree(limit_bytes=260)
    for name in "abcdefghijklmnopqrstuvwxyz":
        tree.add(name, rng.choice([None, *tree.blocks]) if tree.blocks else None)
        tree.pool.touch(tree.blocks[rng.choice(list(tree.blocks))])
    expected = tree.order
    gone = ""
    while tree.pool.num_blocks:
        before = {n for n, b in tree.blocks.items() if b.resident}
        assert tree.pool.reclaim(1)
        gone += (before - {n for n, b in tree.blocks.items() if b.resident}).pop()
        tree.pool.check_integrity()
    assert gone == expected
    assert tree.ledger.used_bytes == 0


def test_a_reference_keeps_a_block_and_all_before_it():
    tree = Tree()
    tree.chain("abc")
    tree.add("x", "b")
    tree.pool.acquire(tree.blocks["b"])
    assert tree.order == "cx"
    assert tree.pool.protected_bytes == 20
    tree.pool.release(tree.blocks["b"])
    assert tree.order == "cxba"
    tree.pool.check_integrity()


def test_a_full_ledger_is_relieved_of_just_enough():
    tree = Tree(limit_bytes=40)
    tree.chain("abcd")
    assert tree.ledger.charge(15)
    assert tree.order == "ba"
    assert tree.ledger.used_bytes == 35
    assert tree.pool.num_evictions == 2


def test_nothing_is_evicted_for_what_would_not_fit_even_then():
    tree = Tree(limit_bytes=40)
    tree.pool.acquire(tree.chain("abc"))
    tree.add("x")
    assert not tree.ledger.charge(11)
    assert tree.order == "x"
    assert tree.ledger.charge(10)


def test_a_tail_goes_with_the_last_session_that_goes_on_from_it_and_whole_blocks_stay():
    tree = Tree()
    tree.chain("ab")
    tail = tree.add("t", "b", num_tokens=2)
    tree.pool.add_session(tail)
    tree.pool.add_session(tail)
    tree.pool.remove_session(tail)
    assert tail.resident
    tree.pool.remove_session(tail)
    assert not tail.resident
    assert tree.order == "ba"
    assert tree.ledger.used_bytes == 20


def test_a_session_that_leaves_nothing_behind_spares_what_others_go_on_from():
    tree = Tree()
    tree.chain("abcd")
    tree.pool.add_session(tree.blocks["b"])
    tree.pool.add_session(tree.blocks["d"])
    tree.pool.remove_session(tree.blocks["d"], whole=True)
    assert tree.order == "ba"


def test_a_block_released_too_often_is_a_bug_that_shows():
    tree = Tree()
    block = tree.chain("a")
    with pytest.raises(AssertionError, match="released too often"):
        tree.pool.release(block)


def test_a_thousand_uses_of_one_leaf_leave_no_thousand_entries_behind():
    tree = Tree()
    block = tree.chain("a")
    for _ in range(1000):
        tree.pool.touch(block)
    assert len(tree.pool._leaves) < 100
    assert tree.pool.reclaim(10)


def test_a_block_in_use_can_be_replaced_by_a_richer_one():
    tree = Tree()
    block = tree.chain("ab")
    tree.pool.acquire(block)
    assert tree.ledger.charge(15)
    tree.pool.replace(block, Payload(15))
    tree.pool.check_integrity([block])
    tree.pool.release(block)
    assert tree.pool.protected_bytes == 0
    assert tree.ledger.used_bytes == 25


@pytest.mark.parametrize("held", [False, True])
def test_of_prompts_that_end_in_one_block_the_latest_is_kept_and_goes_with_it(held):
    tree = Tree()
    block = tree.chain("ab")
    if held:
        tree.pool.acquire(block)
    for num_tokens, nbytes in ((5, 3), (7, 5), (6, 2)):
        assert tree.ledger.charge(nbytes)
        tree.pool.end_prompt(block, PromptEnd(num_tokens, FakeLogits((), nbytes)))
        assert tree.ledger.used_bytes == tree.pool.used_bytes == 20 + nbytes
        assert tree.pool.protected_bytes == (20 + nbytes) * held
        tree.pool.check_integrity([block] * held)
    assert tree.ledger.charge(14)
    tree.pool.replace(block, Payload(14))
    assert (block.prompt_end.num_tokens, tree.ledger.used_bytes) == (6, 10 + 14 + 2)
    if held:
        tree.pool.release(block)
    tree.pool.drop(block)
    assert block.prompt_end is None
    assert tree.ledger.used_bytes == tree.pool.used_bytes == 10
    tree.pool.check_integrity()
