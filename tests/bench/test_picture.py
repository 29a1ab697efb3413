"""The picture of a report is XML that shows every bar within its frame."""

import xml.etree.ElementTree as ET

import pytest

from mlx_mcp.bench.picture import WIDTH, picture
from mlx_mcp.bench.report import Figure, Report, spelled

SVG = "{http://www.w3.org/2000/svg}"


def report(*figures, name="m", complete=True):
    return Report("1.0", "Linux", {"name": "CPU"}, {"name": name}, list(figures), complete)


def test_bars_are_as_long_as_their_figures_say_and_within_the_frame():
    drawn = ET.fromstring(
        picture(
            report(Figure("decode", "1 row", 50.0, "tokens/s", 100.0), Figure("decode", "4 rows", 25.0, "tokens/s"))
        )
    )
    bars = [float(r.get("width")) for r in drawn.iter(f"{SVG}rect") if r.get("height") == "16"]
    assert bars == [200, 400, 100]
    height = float(drawn.get("height"))
    assert all(0 <= float(t.get("x")) <= WIDTH and 0 < float(t.get("y")) < height for t in drawn.iter(f"{SVG}text"))


def test_no_words_lie_over_others():
    rows = [Figure("decode", f"{n} rows", 9e9, "tokens/s", 8e9, f"mixed: 20 to {n} tokens" * 3) for n in range(9)]
    drawn = ET.fromstring(picture(report(*rows, Figure("first token", "cold", 1.0, "s", note="a prompt of 9 tokens"))))
    spans = []
    for t in drawn.iter(f"{SVG}text"):
        wide = 0.58 * float(t.get("font-size")) * len(t.text)
        left = float(t.get("x")) - (wide if t.get("text-anchor") == "end" else 0)
        spans.append((float(t.get("y")), left, left + wide))
    for y, left, right in spans:
        assert left >= 0
        assert right <= WIDTH
        assert sum(y == at and left < end and start < right for at, start, end in spans) == 1, (y, left, right)


def test_what_was_left_out_has_no_bar_and_says_why():
    drawn = picture(report(Figure("prefill", "passes of 512", None, "tokens/s", note="it would take 240 s")))
    assert "left out: it would take 240 s" in drawn
    assert 'height="16"' not in drawn


def test_a_name_cannot_break_out_of_the_picture():
    name = '</text><script>"&\x00\x1b[1m'
    drawn = ET.fromstring(picture(report(Figure("decode", name, 1.0, "tokens/s"), name=name)))
    assert not list(drawn.iter(f"{SVG}script"))


def test_a_report_of_nothing_is_a_picture_too():
    assert ET.fromstring(picture(Report("1.0", "Linux"))).tag == f"{SVG}svg"


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "s", "left out"),
        (0.0123, "s", "12.3 ms"),
        (3.0, "s", "3.00 s"),
        (12.0, "bytes", "12 bytes"),
        (3_700_000.0, "bytes", "3.7 MB"),
        (1234.4, "tokens/s", "1,234 tokens/s"),
        (1.5, "tokens/s", "1.50 tokens/s"),
    ],
)
def test_a_figure_is_spelled_in_the_size_that_reads_best(value, unit, shown):
    assert spelled(value, unit) == shown
