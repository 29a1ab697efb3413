"""Grammars of calls, in llguidance's dialect of Lark; see its docs/syntax.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_SIGNS = re.compile(r"([\\^$.|?*+()\[\]{}/])")  # what means something in a regular expression

# At most one space after "," and ":", as models write it, and none elsewhere.
SPACES = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

# A marker or a text as a grammar has it: in quotes, unless a tokenizer has tokens of its own for it.
Spell = Callable[[str], str]


def quoted(text: str) -> str:
    """A text in quotes."""
    return json.dumps(text, ensure_ascii=False)


def functions(tools: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The names of tools, and the schemas of their arguments, which are objects that have what is named and no more."""
    found = []
    for tool in tools:
        function = tool.get("function", tool)
        schema = {"type": "object"} | (function.get("parameters") or {})
        if "properties" in schema:
            schema = {"additionalProperties": False} | schema
        found.append((function["name"], schema))
    return found


def json_of(schema: Any) -> str:
    """A JSON value that obeys a schema."""
    said = schema if isinstance(schema, dict) else {}
    return f"%json {json.dumps(said | {'x-guidance': SPACES}, ensure_ascii=False)}"


def one_of(rules: Iterable[str]) -> str:
    """Any of these."""
    return f"({' | '.join(rules)})"


def sequence(*parts: str) -> str:
    """These one after another."""
    return " ".join(filter(None, parts))


class Rules:
    """The rules of a grammar."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, body: str) -> str:
        """A rule; returns its name."""
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def text_to(self, marker: str, spell: Spell, *without: str) -> str:
        """A rule for any text up to `marker`, and the marker, with none of `without` in it; returns its name."""
        signs = (_SIGNS.sub(r"\\\1", text).replace("\n", r"\n") for text in without)
        text = " & ".join(["/(?s:.*)/", *(f"~/(?s:.*){sign}(?s:.*)/" for sign in signs)])
        if spell(marker) != quoted(marker):  # a token, which no text has in it
            return self.add(f"{self.add(text)} {spell(marker)}")
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}[suffix={quoted(marker)}]: {text}")
        return name

    def source(self, start: str) -> str:
        """The grammar whose texts are `start`."""
        return "\n".join([f"start: {start}", *self._lines])
