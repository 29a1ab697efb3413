"""What models write, split into thoughts, answer and tool calls; whatever the family, and however it comes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mcp.chat.formats.detect import format_of
from mlx_mcp.chat.formats.families import FAMILIES as TABLE
from mlx_mcp.chat.formats.format import Format
from mlx_mcp.chat.message import ToolCall
from mlx_mcp.chat.reader_of import reader_of
from tests.chat.written import CALLS, FAMILIES, TOOLS, Written
from tests.effort import drawn

Read = tuple[list[tuple[str, str]], list[ToolCall], tuple[str, ...]]

THINKING = {name: family for name, family in FAMILIES.items() if family.thoughts[0]}


def read(
    form: Format,
    parts: Iterable[str],
    reasoning: bool = False,
    tools: Iterable[dict[str, Any]] = TOOLS,
    cut: bool = False,
) -> Read:
    """What a reader makes of a text that comes in parts: its pieces, its calls without their ids, its notes."""
    reader = reader_of(form, reasoning, tuple(tools))
    pieces = [piece for part in parts for piece in reader.feed(part)] + reader.finish(cut)
    runs = groupby(pieces, key=lambda piece: piece.kind.value)
    calls = [ToolCall(call.name, call.arguments) for call in reader.tool_calls]
    return [(kind, "".join(piece.text for piece in run)) for kind, run in runs], calls, reader.notes


def text_of(pieces: list[tuple[str, str]], kind: str) -> str:
    """The text of one kind."""
    return "".join(text for found, text in pieces if found == kind)


def whole_answer(family: Written) -> str:
    """Thoughts, a text and the two calls."""
    (begin, end), (before, after) = family.thoughts, family.answer
    # Functionary's prompts end within the header of the first message.
    first = before.removeprefix(">>>") if family.form.headers and family.form.headers.opened else before
    return f"{f'{begin}{chr(10)}Hm, <b> é.{end}' if begin else ''}{first}I look.{after}{family.calls}"


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_text_and_calls_are_told_apart(name):
    family = FAMILIES[name]
    pieces, calls, notes = read(family.form, [whole_answer(family)])
    assert (calls, notes) == (CALLS, ())
    assert text_of(pieces, "answer").strip() == "I look."
    assert text_of(pieces, "reasoning").strip() == ("Hm, <b> é." if family.thoughts[0] else "")


def test_every_family_of_the_table_is_among_these():
    named = {family.form.calls.name for family in FAMILIES.values() if family.form.calls}
    assert {family.calls.name for family in TABLE} | {"harmony", "muse", "functionary-v3.2", "hunyuan"} == named


def cuts_of(text: str, places: Iterable[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_comes_of_it_however_it_is_cut(name):
    family = FAMILIES[name]
    text = whole_answer(family)
    expected = read(family.form, [text])
    assert read(family.form, text) == expected

    @settings(max_examples=drawn(500), deadline=None)
    @given(places=st.lists(st.integers(0, 10_000), max_size=20))
    def check(places):
        assert read(family.form, cuts_of(text, places)) == expected

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_whatever_is_cut_off_is_no_call_and_none_of_it_is_lost(name):
    family = FAMILIES[name]
    text = whole_answer(family)
    for end in range(len(text) - 1):
        pieces, calls, _ = read(family.form, [text[:end]], cut=True)
        assert calls == CALLS[: len(calls)], f"after {text[:end]!r}"
        if not calls and "look" in text[:end].split("I look.")[-1] and '"é"' in text[:end]:
            assert '"é' in text_of(pieces, "answer"), f"lost of {text[:end]!r}"


@pytest.mark.parametrize("name", FAMILIES)
def test_any_text_of_markers_is_read_alike_however_it_is_cut(name):
    """Text that no model should write, made of the family's markers and of what stands between them."""
    family = FAMILIES[name]
    words = [*family.form.markers, "look", "stop", '{"at": "x"}', '"', "{", "}", "\n", " ", "é", "name", "=", "x"]
    chosen = st.lists(st.sampled_from(sorted(filter(None, words))), max_size=12).map("".join)

    @settings(max_examples=drawn(200), deadline=None)
    @given(text=chosen, places=st.lists(st.integers(0, 10_000), max_size=8), cut=st.booleans())
    def check(text, places, cut):
        expected = read(family.form, [text], cut=cut)
        assert read(family.form, text, cut=cut) == expected
        assert read(family.form, cuts_of(text, places), cut=cut) == expected

    check()


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_that_the_prompt_opened_end_at_their_marker(name):
    family = THINKING[name]
    form = family.form
    (begin, end), (before, after) = family.thoughts, family.answer
    if form.headers is None:
        assert form.opened_thoughts(f"…{begin}\n") == form.thoughts[0]
        assert form.opened_thoughts(f"…{begin}\n{end}\n\n") is None
        for opened in ("\nHm.", f"{begin}\nHm."):
            pieces = read(form, [f"{opened}{end}{before}So.{after}"], reasoning=True)[0]
            assert [(kind, text.strip()) for kind, text in pieces] == [("reasoning", "Hm."), ("answer", "So.")]


@pytest.mark.parametrize("name", THINKING)
def test_a_call_that_is_drafted_in_thoughts_is_thought(name):
    family = THINKING[name]
    (begin, end), (before, after) = family.thoughts, family.answer
    if family.form.headers is None and end not in family.calls and not family.form.calls_in_thoughts:
        pieces, calls, notes = read(family.form, [f"{begin}I could: {family.calls} or not.{end}{before}No.{after}"])
        assert calls == []
        assert text_of(pieces, "reasoning").strip() == f"I could: {family.calls} or not."
        assert text_of(pieces, "answer").strip() == "No."
        assert notes == ("The model drafted a tool call in its thoughts; drafts are not taken for calls.",)


@pytest.mark.parametrize("name", THINKING)
def test_a_marker_of_thoughts_in_the_middle_of_an_answer_is_text(name):
    family = THINKING[name]
    begin, end = family.thoughts
    if family.form.headers is None and end not in family.form.frame:
        written = f"One writes {begin} and {end} around it."
        assert read(family.form, written)[:2] == ([("answer", written)], [])


def test_thoughts_that_the_prompt_opened_end_with_the_markers_that_it_chose():
    form = format_of("[TOOL_CALLS] [THINK] [/THINK] <think> </think>", ())
    for begin, end in (("[THINK]", "[/THINK]"), ("<think>", "</think>")):
        assert form.opened_thoughts(f"…{begin}")
        assert read(form, f"Hm.{end}So.", reasoning=True)[0] == [("reasoning", "Hm."), ("answer", "So.")]
        assert read(form, f"{begin}Hm.{end}So.")[0] == [("reasoning", "Hm."), ("answer", "So.")]


def test_what_an_answer_stands_in_is_not_shown():
    granite = format_of(
        "Write your thoughts between <think></think> and your response between <response></response>", ()
    )
    written = "<think>Hm.</think>\n<response>One writes <response>.</response>"
    assert read(granite, written)[0] == [("reasoning", "Hm."), ("answer", "One writes <response>.")]
    assert read(granite, "One writes <response> and </response>.")[0] == [
        ("answer", "One writes <response> and </response>.")
    ]


def test_the_headers_of_gpt_oss_say_what_a_message_is():
    harmony = FAMILIES["harmony"].form
    analysis, start = "<|channel|>analysis<|message|>Hm.<|end|>", "<|start|>assistant"
    final = f"{start}<|channel|>final <|constrain|>json<|message|>{{}}"
    assert read(harmony, analysis + final)[0] == [("reasoning", "Hm."), ("answer", "{}")]
    preamble = f"{start}<|channel|>commentary<|message|>I look.<|end|>"
    assert read(harmony, analysis + preamble + final)[0][1:] == [("answer", "I look.\n\n{}")]
    for header in (
        " to=functions.stop<|channel|>commentary <|constrain|>json",
        "<|channel|>commentary to=functions.stop <|constrain|>json",
        "<|channel|>analysis to=functions.stop",
        "<|channel|>commentary to=stop",
    ):
        assert read(harmony, f"{analysis}{start}{header}<|message|>{{}}")[1] == [ToolCall("stop", {})], header
    written = f"{start}<|channel|>final {{}}"
    pieces, _, notes = read(harmony, written)
    assert (pieces, len(notes)) == ([("answer", written)], 1)
    assert read(harmony, "No header at all.") == ([("answer", "No header at all.")], [], ())
    assert read(harmony, "<|channel|>final<|message|>One writes <|channel|> here.")[0] == [
        ("answer", "One writes <|channel|> here.")
    ]


def test_apertus_makes_its_calls_within_its_thoughts():
    apertus = FAMILIES["apertus"]
    pieces, calls, notes = read(apertus.form, f"<|inner_prefix|>Hm.{apertus.calls} So.<|inner_suffix|>Yes.")
    assert (calls, notes) == (CALLS, ())
    assert pieces == [("reasoning", "Hm."), ("tool_call", apertus.calls), ("reasoning", " So."), ("answer", "Yes.")]
    written = "Hm.<|tools_prefix|>[...]<|tools_suffix|> So."
    assert read(apertus.form, f"<|inner_prefix|>{written}<|inner_suffix|>Yes.")[:2] == (
        [("reasoning", written), ("answer", "Yes.")],
        [],
    )
