"""How a model writes calls, taken from a call that its own chat template shows.

Where names and arguments stand in what the template shows, every other text is the notation's. Arguments may be one
JSON object, or one element each. The reader of the model's format has to read the shown call as what it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mlx_mcp.chat.formats.format import CallSyntax, Format
from mlx_mcp.chat.formats.messages import HARMONY
from mlx_mcp.chat.message import Message, ToolCall

NAME, KEYS = "f69b9ca4cb423", ("k169b9ca4", "k269b9ca4", "k369b9ca4")
VALUES: tuple[str, str, int] = ("v169b9ca4", "v269b9ca4", 76942)
TEXTS = [text for pair in zip(KEYS, map(str, VALUES), strict=True) for text in pair]
ID = "000000001"  # of the call, where templates want one
SAMPLE = ToolCall(NAME, dict(zip(KEYS, VALUES, strict=True)), ID)
MESSAGES = [Message("user", "x"), Message("assistant", tool_calls=(SAMPLE,))]
OFFERED: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": "x",
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": "number" if isinstance(value, int) else "string", "description": "x"}
                    for key, value in SAMPLE.arguments.items()
                },
            },
        },
    },
)


@dataclass(frozen=True)
class Elements:
    """The texts around arguments that are one element each: before and behind the key, and behind the value.

    Behind the key stands `string` before a string, and `other` before any other value.
    """

    key: str
    string: str
    other: str
    close: str


@dataclass(frozen=True)
class Notation:
    """The texts around a call's name and arguments.

    `begin` is all that comes before the first call's `opener`, and the opener. Where `head` or `tail` stand around the
    call, several may stand there as a list. Between the name and the arguments stands one of `between`. Without
    `elements` the arguments are one JSON object.
    """

    begin: str
    opener: str
    before: str
    between: tuple[str, ...]
    after: str
    elements: Elements | None = None
    head: str = ""
    tail: str = ""


HARMONY_CALLS = Notation(
    "<|channel|>commentary to=functions.",
    "to=functions.",
    "",
    (" <|constrain|>json<|message|>", "<|channel|>commentary <|constrain|>json<|message|>"),
    "",
)


def notation_of(form: Format, shown: str, stops: Sequence[str]) -> Notation | None:
    """The notation of a format's calls, by what the template makes of MESSAGES; None if it does not show that.

    `stops` are the texts of the tokens that end a turn.
    """
    if form.name == HARMONY.name:
        return HARMONY_CALLS
    if form.calls is None or form.headers is not None:  # calls of other messages stand behind headers of their own
        return None
    places, value = list[int](), shown.find(VALUES[0])
    # The tools that were offered may be shown with the same name before.
    name = shown.rfind(NAME, 0, max(value, 0))
    if min(name, value) < 0:
        return None
    end = name + len(NAME)
    for text in TEXTS:
        places.append(shown.find(text, end))
        end = places[-1] + len(text)
    opener = max(form.calls.openers, key=lambda text: shown.rfind(text, 0, name), default="")
    start = shown.rfind(opener, 0, name) if opener else -1
    if start < 0:
        opener, start = "", shown.rfind("{", 0, name)
    if min(places, default=-1) < 0 or start < 0:
        return None
    around = _json(shown, name) or _elements(shown, name, places)
    if around is None:
        return None
    between, elements, end = around
    after = _up_to_end(form.calls, shown[end:], stops)
    if not _is_read(form.calls, shown[start:end] + after):
        return None
    begin = shown[_section(form.calls, shown, start, opener) : start] + opener
    found = Notation(begin, opener, shown[start + len(opener) : name], (between,), after, elements)
    if elements is None:
        return _as_list(found)
    return replace(found, after=after[len(elements.close) :]) if after.startswith(elements.close) else None


def _json(shown: str, name: int) -> tuple[str, None, int] | None:
    """The text between a name and a JSON object of arguments, and where that ends."""
    given = shown.find("{", name)
    with suppress(ValueError):
        arguments, end = json.JSONDecoder().raw_decode(shown, given)
        if arguments == SAMPLE.arguments:
            return shown[name + len(NAME) : given], None, end
    return None


def _elements(shown: str, name: int, places: list[int]) -> tuple[str, Elements, int] | None:
    """The text between a name and elements, the texts in these, and where the last value ends."""
    end, between = name + len(NAME), []
    for place, text in zip(places, TEXTS, strict=True):
        between.append(shown[end:place])
        end = place + len(text)
    first, string, close, string_again, close_again, other = between
    size = next((n for n in range(min(len(first), len(close)), 0, -1) if first.endswith(close[-n:])), 0)
    # The last tag may end like the one before it, but belongs to it as a whole.
    size -= next((n for n, char in enumerate(close[len(close) - size :]) if char.isspace() or char == "<"), 0)
    key, close = close[len(close) - size :], close[: len(close) - size]
    if string != string_again or close + key != close_again or not key or not close.strip():
        return None
    return first[: len(first) - size], Elements(key, string, other, close), end


def _up_to_end(syntax: CallSyntax, rest: str, stops: Sequence[str]) -> str:
    """What of the text behind the arguments belongs to the call."""
    if syntax.after and syntax.after in rest:
        return rest[: rest.index(syntax.after) + len(syntax.after)]
    cuts = [rest.find(text) for text in (*stops, syntax.end) if text and text in rest]
    return rest[: min(cuts, default=len(rest))].rstrip()


def _section(syntax: CallSyntax, shown: str, start: int, opener: str) -> int:
    """Where the section begins whose first call begins at `start`; there, if calls stand alone."""
    section = shown.rfind(syntax.begin, 0, start) if syntax.begin != opener else -1
    return section if section >= 0 and not shown[section + len(syntax.begin) : start].strip() else start


def _is_read(syntax: CallSyntax, written: str) -> bool:
    """Whether the family's reader reads the call as what it is."""
    try:
        calls = syntax.parse(written, OFFERED)
    except Exception:  # it is not written as this format's models write
        return False
    return [(call.name, call.arguments) for call in calls] == [(NAME, SAMPLE.arguments)]


def _as_list(found: Notation) -> Notation:
    """The notation, with what stands around all calls apart where they are a JSON list."""
    head, bracket, before = found.before.partition("[")
    after, closing, tail = found.after.partition("]")
    if not (bracket and closing) or head.strip():
        return found
    kept = after.rstrip()
    return replace(found, head=head + bracket, before=before, after=kept, tail=after[len(kept) :] + closing + tail)
