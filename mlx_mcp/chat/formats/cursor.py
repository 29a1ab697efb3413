"""A place in text that is still being written, and what can be read from there on. Knows no notation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

# What decides where a JSON value ends: quotes, escapes and brackets.
_SPACE = re.compile(r"\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_STRUCTURE = re.compile(r'["\\\[\]{}]')


class More(Exception):
    """The text ends before it is decided what stands here."""


class Malformed(Exception):
    """What stands here is not what the notation has."""


class Cursor:
    """Reads a notation from `pos` on.

    Every method moves the cursor behind what it has read. What is read stays the same whatever text follows.

    Raises, in all methods:
        More: the text must go on before that can be said. Where `ended` is set it will not go on, and this means that
            what was written is incomplete.
        Malformed: something else stands here.
    """

    def __init__(self, text: str, pos: int = 0, ended: bool = False, cut: bool = False) -> None:
        """`ended` says that no text follows; `cut`, that it ended at a limit and not by the model's own choice."""
        self.text, self.pos, self.ended, self.cut = text, pos, ended, cut

    @property
    def at_end(self) -> bool:
        """Whether no text is left."""
        return self.pos >= len(self.text)

    def sees(self, literal: str) -> bool:
        """Whether `literal` stands here; the cursor stays."""
        if self.text.startswith(literal, self.pos):
            return True
        if not self.ended and literal.startswith(self.text[self.pos :]):
            raise More
        return False

    def skip(self, literal: str) -> bool:
        """Go behind `literal` if it stands here."""
        found = self.sees(literal)
        if found:
            self.pos += len(literal)
        return found

    def take(self, literal: str) -> None:
        """Go behind `literal`, which must stand here."""
        if not self.skip(literal):
            if literal.startswith(self.text[self.pos :]):
                raise More
            raise Malformed(f"{literal!r} is missing")

    def space(self) -> str:
        """Go behind white space."""
        start = self.pos
        found = _SPACE.match(self.text, self.pos)
        self.pos = found.end() if found else self.pos
        if self.at_end and not self.ended:
            raise More
        return self.text[start : self.pos]

    def until(self, *ends: str) -> str:
        """Go to the first of `ends`, none of which may be a part of another, and return the text before it."""
        found = [place for end in ends if (place := self.text.find(end, self.pos)) >= 0]
        if not found:
            raise More
        start, self.pos = self.pos, min(found)
        return self.text[start : self.pos]

    def without_part_of(self, start: int, ends: Iterable[str]) -> str:
        """The text from `start` on, without what may be the beginning of one of `ends`."""
        text = self.text[start:]
        held = (cut for end in ends for cut in range(len(end) - 1, 0, -1) if text.endswith(end[:cut]))
        return text[: len(text) - max(held, default=0)]

    def json(self) -> Any:
        """One JSON object or array."""
        start = self.pos
        if not self.text.startswith(("{", "["), start):
            raise More if self.at_end else Malformed("no JSON object")
        self.pos = balanced_end(self.text, start)
        return read_json(self.text[start : self.pos])


def balanced_end(text: str, start: int) -> int:
    """Where the JSON object or array that begins at `start` ends.

    Raises:
        More: the text ends before it does.
    """
    depth, in_string, pos = 0, False, start
    while found := _STRUCTURE.search(text, pos):
        char, pos = found[0], found.end()
        if char == "\\":
            pos += 1
        elif char == '"':
            in_string = not in_string
        elif not in_string:
            depth += 1 if char in "[{" else -1
            if depth == 0:
                return pos
    raise More


def balanced_string(cursor: Cursor) -> str:
    """The JSON string that begins at the cursor, which goes behind it.

    Raises:
        More or Malformed: see Cursor.
    """
    found = _STRING.match(cursor.text, cursor.pos)
    if found is None:
        raise More
    cursor.pos = found.end()
    return str(read_json(found[0]))


def read_json(text: str) -> Any:
    """A JSON text as a value; line breaks within strings, which small models write, are taken.

    Raises:
        Malformed: it is not JSON, has a key twice, or says what no JSON value holds exactly (NaN, half a surrogate).
    """
    try:
        value = json.loads(text, strict=False, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # refuses half a surrogate
    except (ValueError, RecursionError) as error:
        raise Malformed("its JSON cannot be read") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Malformed("its JSON has a key twice")
    return found


def _refuse(word: str) -> Any:
    raise Malformed(f"{word} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise Malformed("a number in its JSON is too large for any reader")
    return number
