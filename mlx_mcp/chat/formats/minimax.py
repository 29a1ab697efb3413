"""Calls as MiniMax-M3 writes them: elements all the way down, each tag behind a marker."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.formats.cursor import Cursor, Malformed
from mlx_mcp.chat.formats.format import CallSyntax
from mlx_mcp.chat.formats.offered import Offered, typed
from mlx_mcp.chat.message import ToolCall

SPACE = "]<]minimax[>["  # the marker before each tag
_NAME = re.compile(r"""name\s*=\s*["']([^"']+)["']\s*""")
ITEM = "item"


@dataclass(frozen=True, kw_only=True)
class ElementCalls(CallSyntax):
    """`<invoke name="look"><at>door</at></invoke>`; objects and arrays are elements too, with `item`s."""

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        self.take_opener(cursor)
        found = _NAME.fullmatch(cursor.until(">"))
        if found is None:
            raise Malformed("no name of a tool")
        cursor.take(">")
        arguments: dict[str, Any] = {}
        cursor.space()
        while not cursor.skip(self.after):
            key, value = self._element(cursor, None, found[1], tools)
            if key in arguments:
                raise Malformed("an argument stands there twice")
            arguments[key] = value
            cursor.space()
        return [ToolCall(found[1], arguments)]

    def _element(self, cursor: Cursor, schema: Any, tool: str, tools: Offered) -> tuple[str, Any]:
        cursor.take(f"{SPACE}<")
        key = cursor.until(">")
        cursor.take(">")
        own = tools.schema(tool, key) if schema is None else part_of(schema, key)
        end = f"{SPACE}</{key}>"
        text = cursor.until(SPACE)
        if cursor.skip(end):
            return key, empty_or(typed(text, own), text, own)
        children = []
        while not cursor.skip(end):
            children.append(self._element(cursor, own or {}, tool, tools))
            cursor.space()
        if text.strip():
            raise Malformed("text stands between elements")
        names = [name for name, _ in children]
        if set(names) == {ITEM}:
            return key, [value for _, value in children]
        if len(set(names)) < len(names):
            raise Malformed("an element stands there twice")
        return key, dict(children)


def part_of(schema: dict[str, Any], key: str) -> dict[str, Any]:
    """The schema of an item or a property; one that says nothing where there is none."""
    properties = schema.get("properties")
    found = schema.get("items") if key == ITEM else None
    if found is None and isinstance(properties, dict):
        found = properties.get(key)
    return found if isinstance(found, dict) else {}


def empty_or(value: Any, text: str, schema: dict[str, Any]) -> Any:
    """What an element without content is by its schema."""
    if text:
        return value
    kind = schema.get("type")
    return [] if kind == "array" else {} if kind == "object" else value
