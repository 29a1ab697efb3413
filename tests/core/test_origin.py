"""Who asked for a turn, and when, as values."""

import pytest

from mlx_mcp.core.origin import LATEST, MAX_ORIGINS, MAX_WHO, Origin, called, is_sound, with_turn


def test_a_client_is_called_by_one_line_of_64_printable_characters_at_most():
    assert called("claude-code", "2.1.332") == "claude-code 2.1.332"
    assert called("", "curl/8.5.0") == "curl/8.5.0"
    assert called("a\x1b[31m\nb\u202ec\ud800") == "a[31mbc"
    assert len(called("x" * 100)) == MAX_WHO == 64
    assert called() == called("", "\n") == ""


def test_people_read_the_time_in_utc_and_then_who_asked():
    assert Origin("claude-code 2.1.332", 1764541234.9).line == "2025-11-30 22:20:34 UTC, claude-code 2.1.332"
    assert Origin("", 0).line == "1970-01-01 00:00:00 UTC"


def test_only_the_latest_512_turns_are_known():
    origins = ()
    for begin in range(600):
        origins = with_turn(origins, Origin("ann", 7.0), begin)
    assert len(origins) == MAX_ORIGINS == 512
    assert (origins[0], origins[-1]) == (Origin("ann", 7.0, 88), Origin("ann", 7.0, 599))


@pytest.mark.parametrize(
    "origins",
    [
        (Origin("a", 1.0, 9),),
        (Origin("a", 1.0, -1),),
        (Origin("a", 1.0, 4), Origin("a", 1.0, 2)),
        (Origin("a", 1.0, 4), Origin("a", 1.0, 4)),
        (Origin("a", -1.0),),
        (Origin("a", LATEST),),
        (Origin("a", float("nan")),),
        (Origin("a" * 65, 1.0),),
        (Origin("a\x1b[2J", 1.0),),
    ],
)
def test_turns_that_no_session_of_nine_tokens_can_have_are_told(origins):
    assert not is_sound(origins, 9)


def test_turns_in_their_order_within_the_tokens_are_sound():
    assert is_sound((), 0)
    assert is_sound((Origin("", 0), Origin("b", 1764541234.9, 8)), 9)
    assert not is_sound(tuple(Origin("a", 1.0, begin) for begin in range(513)), 1000)
