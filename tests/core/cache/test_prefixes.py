"""Which prefix is found, and that it is never another's."""

import random

import pytest

from mlx_mcp.core.cache import prefixes
from mlx_mcp.core.cache.blocks import BlockPool
from mlx_mcp.core.cache.prefixes import PrefixCache, common
from mlx_mcp.core.layout import Layout, PromptEnd
from mlx_mcp.core.slots import Ledger
from tests.effort import drawn
from tests.fakes import FakeLogits, FakePayload

PLAIN = Layout()


class Table:
    """A cache of blocks of 4 tokens whose payloads are the tokens themselves."""

    def __init__(self, hash_bytes=32, root=b"root"):
        self.cache = PrefixCache(BlockPool(Ledger(1 << 40), 4), hash_bytes)
        self.root = self.cache.pool.root(root, root)

    def put(self, tokens, state_at=(), root=None, windows=True):
        """Put all of `tokens` in, the last few as a tail."""
        block = root or self.root
        for start in range(0, len(tokens), 4):
            piece = tuple(tokens[start : start + 4])
            end = start + len(piece)
            payload = FakePayload(piece, start if windows else end, end in state_at)
            assert self.cache.pool.ledger.charge(payload.nbytes)
            before, block = block, self.cache.put(block, piece, payload, payload.nbytes, private=False)
            if block is before:
                return block
        return block

    def match(self, tokens, layout=PLAIN, root=None):
        tokens, root = tuple(tokens), root or self.root
        match = self.cache.match(root, tokens, self.cache.hashes(root, tokens, []), layout)
        found = tuple(t for part in match.parts for t in part.payload.tokens[: part.num_tokens])
        assert found == tokens[: match.num_tokens]
        self.cache.pool.check_integrity()
        return match.num_tokens


def test_a_prefix_is_found_to_the_token():
    table = Table()
    table.put(range(20))
    assert table.match(range(30)) == 20
    assert table.match([*range(10), 99, 99]) == 10
    assert table.match([99, *range(20)]) == 0


@pytest.mark.parametrize("length", [9, 11, 12])
def test_all_tokens_are_found_where_the_logits_after_them_are_there(length):
    table = Table()
    last = table.put(range(12))
    assert table.match(range(length)) == length - 1
    assert table.cache.pool.ledger.charge(3)
    table.cache.pool.end_prompt(last, PromptEnd(length, FakeLogits(tuple(range(length)))))
    assert [table.match(range(n)) for n in range(8, 14)] == [n - (n != length) for n in range(8, 13)] + [12]
    hidden = (*range(8), 99, *range(9, length))
    assert table.match(hidden) == 8


def test_at_least_one_token_is_left_to_compute():
    table = Table()
    table.put(range(20))
    assert [table.match(range(n)) for n in (1, 2, 4, 5, 16, 17, 20)] == [0, 1, 3, 4, 15, 16, 19]


def test_the_branch_that_goes_on_longest_alike_is_found():
    table = Table()
    for tail in ([7, 8], [7, 9, 1], [7, 9]):
        table.put([*range(8), *tail])
    assert table.match([*range(8), 7, 9, 1, 5, 5]) == 11


def test_branches_that_begin_alike_are_not_compared_one_by_one(monkeypatch):
    table = Table()
    for i in range(200):
        table.put([1, 2, 3, i])
    compared = []
    monkeypatch.setattr(prefixes, "common", lambda one, other: compared.append(one) or common(one, other))
    assert table.match([1, 2, 3, 777, 5]) == 3
    assert table.match([1, 2, 3, 199, 5]) == 4
    assert len(compared) <= 4


def test_the_same_block_after_another_prefix_is_no_hit():
    table = Table()
    table.put([1, 1, 1, 1, 5, 5, 5, 5])
    table.put([2, 2, 2, 2])
    assert table.match([2, 2, 2, 2, 5, 5, 5, 5, 9]) == 4


def test_states_go_on_only_from_where_they_were_kept():
    table, states = Table(), Layout(states=True)
    table.put(range(18), state_at=(8, 18))
    assert table.match(range(30), states) == 18
    assert table.match([*range(17), 99, 99], states) == 8
    assert table.match([*range(7), 99], states) == 0


def test_windows_go_on_only_where_their_tokens_are_there():
    table, windows = Table(), Layout(windows=(6,))
    table.put(range(12))
    table.put(range(24), windows=False)  # what is there already keeps its windows
    assert table.match(range(40), windows) == 12
    assert table.match(range(40)) == 24


@pytest.mark.parametrize("windows", [(6,), (3, 6)])
def test_of_the_longest_window_every_token_must_be_there(windows):
    table = Table()
    block = table.put(range(8), windows=False)
    for tokens, window_start in ((range(8, 12), 10), (range(12, 16), 12)):
        assert table.cache.pool.ledger.charge(4)
        block = table.cache.put(block, tuple(tokens), FakePayload(tuple(tokens), window_start, True), 4, private=False)
    assert table.match(range(40), Layout(windows=windows)) == 16
    assert table.match(range(16), Layout(windows=windows)) == 0


def test_hashes_cut_to_a_byte_give_misses_and_never_another_prefix():
    table, rng = Table(hash_bytes=1), random.Random(1)
    prompts = [[rng.randrange(3) for _ in range(rng.randint(4, 24))] for _ in range(400)]
    hits = 0
    for prompt in prompts:
        table.put(prompt)
        hits += table.match([*prompt, 9]) == len(prompt)  # `match` compares every token that it found
    assert 0 < hits < 400
    for prompt in prompts:
        table.match([*prompt, *rng.choice(prompts)])


def test_two_tenants_never_hit_each_others_prefixes_while_one_hits_its_own():
    table, rng = Table(), random.Random(2)
    ann, bob = (table.cache.pool.root(name, name) for name in (b"ann", b"bob"))
    prompts = [[rng.randrange(50) for _ in range(rng.randint(2, 16))] for _ in range(drawn(2000, least=400))]
    for prompt in prompts:
        table.put(prompt, root=ann)
    tries = [rng.choice(prompts) for _ in range(drawn(10_000))]
    assert sum(table_match(table, prompt, bob) for prompt in tries) == 0
    assert all(table_match(table, prompt, ann) == len(prompt) for prompt in tries)


def table_match(table, prompt, root):
    tokens = (*prompt, 77)
    return table.cache.match(root, tokens, table.cache.hashes(root, tokens, []), PLAIN).num_tokens


@pytest.mark.parametrize(("one", "other", "n"), [((), (1,), 0), ((1, 2), (1, 3), 1), ((1, 2), (1, 2, 3), 2)])
def test_common_counts_what_two_runs_begin_with_alike(one, other, n):
    assert common(one, other) == common(other, one) == n
