from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mlx_mcp.core.stop_strings import StopStrings


def fed(stops, pieces):
    stop = StopStrings(tuple(stops))
    shown = [stop.feed(piece) for piece in pieces]
    return shown, stop.finish() if not stop.met else "", stop.met


def test_a_stop_string_that_comes_in_pieces_is_never_shown_in_part():
    assert fed(["END"], ["one E", "N", "D two"]) == (["one ", "", ""], "", True)


def test_what_only_looked_like_a_stop_string_is_shown_at_last():
    assert fed(["END"], ["EN", "ter", "E"]) == (["", "ENter", ""], "E", False)


def test_of_several_stop_strings_the_one_that_is_whole_first_counts():
    assert fed(["bb", "a"], ["xabb"])[0] == ["x"]


@given(
    text=st.text(alphabet="abc", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_pieces_show_what_the_whole_text_would(text, cuts, stops):
    ends = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(ends)]
    shown, last, met = fed(stops, pieces)
    found = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    assert met == bool(found)
    assert "".join(shown) + last == (text[: min(found)[1]] if found else text)
