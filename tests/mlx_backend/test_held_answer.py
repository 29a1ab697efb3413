"""What an answer is held to, part by part; a token is a character, and # ends the turn."""

import pytest

from mlx_mcp.chat.formats.format import Marks
from mlx_mcp.mlx_backend.held_answer import HeldAnswer, Thoughts, Tokens, course

TOKENS = Tokens(128, frozenset({ord("#")}), chr, lambda text: list(map(ord, text)))
ANGLES = Marks("<<", ">>")


def write(held, text):
    """Have the model want to write a text; returns what it has written, forced characters in upper case."""
    written, wanted = "", list(text)
    while wanted:
        mask = held.mask()
        assert (mask is None) == (not held.awake)
        allowed = None if mask is None else int.from_bytes(mask, "little")
        if allowed is not None and allowed.bit_count() == 1:
            token_id = allowed.bit_length() - 1
            written += chr(token_id).upper()
        else:
            token_id = ord(wanted.pop(0))
            assert allowed is None or allowed >> token_id & 1
            written += chr(token_id)
        held.accept(token_id)
    return written


def hold(first=None, **thoughts):
    return HeldAnswer(course(TOKENS, Thoughts((ANGLES,), **thoughts), first, None))


@pytest.mark.parametrize("budget", [0, 1, 4])
@pytest.mark.parametrize(("opened", "before"), [(ANGLES, ""), (None, "<<"), (None, " \n<<")])
def test_thoughts_end_after_exactly_so_many_tokens(budget, opened, before):
    held = hold(opened=opened, budget=budget)
    assert write(held, f"{before}abcdefgh") == f"{before}{'abcdefgh'[:budget]}>>{'abcdefgh'[budget:]}"
    assert not held.awake


def test_thoughts_that_end_by_themselves_are_left_alone():
    for text in ("abc>>defghijk", "abcd>>efghijkl", ">>abcdefghijkl"):
        held = hold(opened=ANGLES, budget=6)
        assert write(held, text) == text
        assert not held.awake


def test_a_marker_that_was_begun_is_ended():
    assert write(hold(opened=ANGLES, budget=3), "ab>xyz") == "ab>>xyz"


@pytest.mark.parametrize("text", ["abc<<defghijklmn", "<abcdefghijklm", "a<<b>>cdefghi", "  x<<abcdefgh"])
def test_where_an_answer_does_not_begin_with_thoughts_it_has_none(text):
    assert write(hold(budget=2), text) == text


def test_a_family_that_begins_messages_goes_on_with_a_header():
    more = Marks("[a", "]")
    thoughts = Thoughts((more, Marks("][a", "]")), None, 5, follow="[F:", lead="F:", again=True)
    assert write(HeldAnswer(course(TOKENS, thoughts, None, None)), "[aone][atwothree") == "[aone][atw][F:othree"
    assert write(HeldAnswer(course(TOKENS, thoughts, None, None)), "[ao]yesandsoon") == "[ao]yesandsoon"
