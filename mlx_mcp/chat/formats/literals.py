"""Values as Python writes them, which small models put where JSON belongs."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from mlx_mcp.chat.formats.cursor import Cursor, Malformed, More

# Strings, and what decides where an expression ends.
_PART = re.compile(r"""\"\"\"|'''|["']|[()\[\]{}]""")
_IN_STRING = {quote: re.compile(rf"\\(.)|{quote}|(\n)", re.DOTALL) for quote in ('"""', "'''", '"', "'")}
_ESCAPES = frozenset("\\'\"abfnrtvxuUN01234567\n")
_CONSTANTS = {"true": True, "false": False, "null": None}
FENCES = ("```json", "```")  # which some models write around JSON


def fenced_value(cursor: Cursor) -> Any:
    """A JSON object or array, which may stand in a fence, or be written as Python's."""
    cursor.space()
    fenced = any(cursor.skip(fence) for fence in FENCES)
    cursor.space()
    value = json_or_literal(cursor)
    if fenced:
        cursor.space()
        cursor.skip("```")
    return value


def json_or_literal(cursor: Cursor) -> Any:
    """A JSON object or array; or one that is written as Python's, with other quotes and constants."""
    start = cursor.pos
    try:
        return cursor.json()
    except Malformed:
        if not cursor.text.startswith(("{'", "[{'"), start):
            raise
    cursor.pos, source = expression_end(cursor.text, start)
    return as_json(literal(parsed(source)))


def parsed(source: str) -> ast.expr:
    """A Python expression as a tree.

    Raises:
        Malformed: it is none.
    """
    try:
        return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Malformed("it is no call in Python's notation") from error


def as_json(value: Any) -> Any:
    """The value, if JSON can hold it.

    Raises:
        Malformed: it cannot.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed("JSON cannot hold its arguments") from error
    return value


def expression_end(text: str, start: int) -> tuple[int, str]:
    """Where the bracket at `start` closes, and what is in it.

    Line breaks in strings, and backslashes that escape nothing, are written as Python has them.

    Raises:
        More: the text ends before it does.
        Malformed: the brackets do not match.
    """
    pos, depth, parts, string_end = start, [], [], -1
    while found := _PART.search(text, pos):
        mark = found[0]
        parts.append(text[pos : found.end()])
        if mark in _IN_STRING:
            # Python would join strings that stand side by side, and read those behind a letter in another way.
            between = text[string_end : found.start()] if string_end >= 0 else ","
            if not between.strip() or text[found.start() - 1].isalnum():
                raise Malformed("a text stands beside another, or behind a letter")
            pos, inner = _string_end(text, found.end(), mark)
            string_end = pos
            parts.append(inner)
            continue
        pos = found.end()
        if mark in "([{":
            depth.append(")]}"["([{".index(mark)])
        elif not depth or depth.pop() != mark:
            raise Malformed("its brackets do not match")
        elif not depth:
            return pos, "".join(parts)
    raise More


def _string_end(text: str, pos: int, quote: str) -> tuple[int, str]:
    parts = []
    while found := _IN_STRING[quote].search(text, pos):
        parts.append(text[pos : found.start()])
        pos = found.end()
        if found[0] == quote:
            return pos, "".join([*parts, quote])
        if found[2]:
            parts.append("\\n")
        else:
            parts.append(found[0] if found[1] in _ESCAPES else f"\\{found[0]}")
    raise More


def literal(node: ast.expr) -> Any:
    """The value of a literal, if JSON has such values; `true`, `false` and `null` may stand in it.

    Raises:
        Malformed: it is something else.
    """
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if value is not True:
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [literal(key) if key is not None else None for key in keys]
            if len(set(map(str, names))) == len(names) and all(isinstance(name, str) for name in names):
                return dict(zip(names, map(literal, values), strict=True))
    raise Malformed("it has a value that JSON does not")
