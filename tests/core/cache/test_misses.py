"""Why a prefix was not found: told only where there is something to tell."""

import random

from mlx_mcp.core.cache.misses import RECENT, MissReason, Recent, alike
from tests.core.house import House, words

RNG = random.Random(5)
TEXT = tuple(RNG.randrange(1000) for _ in range(900))


def test_a_changed_nonce_near_the_beginning_is_found_and_shown():
    recent = Recent()
    recent.remember((1, 2, 3, 70, 71, 72, *TEXT))
    miss = recent.diverged((1, 2, 3, 80, 81, *TEXT))
    assert (miss.reason, miss.index) == (MissReason.DIVERGED, 3)
    assert miss.before == (1, 2, 3)
    assert miss.after[:3] == (80, 81, TEXT[0])
    assert miss.earlier[:4] == (70, 71, 72, TEXT[0])


def test_a_long_insertion_is_found_too():
    recent = Recent()
    recent.remember(TEXT)
    assert recent.diverged((*TEXT[:100], *range(2000, 2200), *TEXT[100:])).index == 100


def test_another_question_after_the_same_text_is_no_miss():
    recent = Recent()
    recent.remember((*TEXT, *range(2000, 2100)))
    assert recent.diverged((*TEXT, *range(3000, 3100))) is None


def test_going_on_where_an_earlier_prompt_ended_is_no_miss():
    recent = Recent()
    recent.remember(TEXT[:500])
    assert recent.diverged(TEXT) is None
    assert recent.diverged(TEXT[:300]) is None


def test_another_text_is_no_miss():
    recent = Recent()
    recent.remember(TEXT)
    assert recent.diverged(tuple(reversed(TEXT))) is None


def test_so_many_prompts_are_remembered_and_no_more():
    recent = Recent()
    for i in range(RECENT + 1):
        recent.remember((i, *TEXT))
        recent.remember((i, *TEXT))  # the same again counts once
    assert recent.num_known((0, *TEXT)) == 0
    assert recent.num_known((1, *TEXT)) == 901


def test_alike_counts_tokens_of_any_length():
    rng = random.Random(4)
    for _ in range(300):
        n, more = rng.randrange(400), rng.randrange(3)
        same = bytes(rng.randrange(256) for _ in range(4 * n))
        assert alike(same + b"abcd" * more, same + b"wxyz" * rng.randrange(3)) == n


def test_an_evicted_prefix_is_computed_again_and_says_so():
    house = House()
    house.say(words(40), max_tokens=1)
    assert house.pool.reclaim(house.pool.used_bytes)
    again = house.say(words(40), max_tokens=1)
    assert (again.num_cached, again.miss.reason) == (0, MissReason.EVICTED)
