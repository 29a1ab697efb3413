"""Calls as Gemma 4 and FunctionGemma write them: `call:look{at:<|"|>door<|"|>,times:2}`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_mcp.chat.formats.cursor import Cursor, Malformed, balanced_string, read_json
from mlx_mcp.chat.formats.format import CallSyntax
from mlx_mcp.chat.formats.grammar import Rules, Spell, json_of, quoted, sequence
from mlx_mcp.chat.formats.json_calls import header
from mlx_mcp.chat.formats.offered import Offered
from mlx_mcp.chat.message import ToolCall

WORD = "call:"


@dataclass(frozen=True, kw_only=True)
class GemmaCalls(CallSyntax):
    """Objects without quotes around keys, and with the marker `quote` around strings."""

    quote: str

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        self.take_opener(cursor)
        cursor.space()
        cursor.take(WORD)
        name = header(cursor, "{")
        arguments = self._object(cursor, lambda key, written: tools.value(name, key, written))
        self.take_after(cursor)
        return [ToolCall(name, arguments)]

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax; the arguments are JSON, which is read here too."""
        return rules.add(sequence(spell(self.openers[0]), quoted(f"{WORD}{name}"), json_of(schema), spell(self.after)))

    def _object(self, cursor: Cursor, typed: Callable[[str, str], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        cursor.take("{")
        cursor.space()
        while not cursor.skip("}"):
            if found:
                cursor.take(",")
                cursor.space()
            key = self._key(cursor)
            cursor.take(":")
            if key in found:
                raise Malformed("an argument stands there twice")
            found[key] = self._value(cursor, partial(typed, key))
            cursor.space()
        return found

    def _key(self, cursor: Cursor) -> str:
        text = self._string(cursor)
        if text is None:
            text = cursor.until(":").strip()
            if any(char in text for char in '{}[],"\n'):
                raise Malformed("no name of an argument")
        cursor.space()
        return text

    def _value(self, cursor: Cursor, typed: Callable[[str], Any]) -> Any:
        cursor.space()
        text = self._string(cursor)
        if text is not None:
            return text
        if cursor.sees("{"):
            return self._object(cursor, lambda _, written: _plain(written))
        if cursor.skip("["):
            return self._items(cursor)
        return typed(cursor.until(",", "}", "]").strip())

    def _items(self, cursor: Cursor) -> list[Any]:
        items: list[Any] = []
        cursor.space()
        while not cursor.skip("]"):
            if items:
                cursor.take(",")
            items.append(self._value(cursor, _plain))
            cursor.space()
        return items

    def _string(self, cursor: Cursor) -> str | None:
        """The string that stands here, between markers or, as other models write, between quotes."""
        if cursor.skip(self.quote):
            text = cursor.until(self.quote)
            cursor.take(self.quote)
            return text
        if cursor.sees('"'):
            return balanced_string(cursor)
        return None


def _plain(written: str) -> Any:
    """A value without quotes, where no schema says what it is."""
    try:
        return read_json(written)
    except Malformed:
        return written
