"""Calls that are written like Python's: `[look(at="door"), wait(seconds=2)]`."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.formats.cursor import Cursor, Malformed, More, read_json
from mlx_mcp.chat.formats.format import CallSyntax
from mlx_mcp.chat.formats.json_calls import calls_of
from mlx_mcp.chat.formats.offered import Offered
from mlx_mcp.chat.message import ToolCall

# Strings, and what decides where an expression ends.
_PART = re.compile(r"""\"\"\"|'''|["']|[()\[\]{}]""")
_IN_STRING = {quote: re.compile(rf"\\(.)|{quote}|(\n)", re.DOTALL) for quote in ('"""', "'''", '"', "'")}
_ESCAPES = frozenset("\\'\"abfnrtvxuUN01234567\n")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_CONSTANTS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, kw_only=True)
class PythonicCalls(CallSyntax):
    """Python calls with keyword arguments, in a list or, with `lines`, one after another.

    Objects as other models write them are taken too, in the same places; several may stand behind semicolons.
    """

    lines: bool = False

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        marked = self.take_opener(cursor)
        cursor.space()
        calls = self._value(cursor, tools)
        if marked and self.after:
            cursor.space()
            while self.lines and not cursor.at_end and not cursor.sees(self.after):
                calls += self._value(cursor, tools)
                cursor.space()
            self.take_after(cursor)
            return calls
        cursor.space()
        while cursor.skip(";"):
            cursor.space()
            calls += self._value(cursor, tools)
            cursor.space()
        return calls

    def _value(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        if cursor.sees("{"):
            return list(calls_of(cursor.json()))
        start, named = cursor.pos, _NAME.match(cursor.text, cursor.pos)
        if cursor.at_end or (named and named.end() == len(cursor.text) and not cursor.ended):
            raise More
        bracket = named.end() if named else start
        if not cursor.text.startswith("(" if named else "[", bracket):
            raise Malformed("no call in Python's notation")
        cursor.pos, source = expression_end(cursor.text, bracket)
        return python_calls(cursor.text[start:bracket] + source, tools)


def expression_end(text: str, start: int) -> tuple[int, str]:
    """Where the bracket at `start` closes, and what is in it.

    Line breaks in strings, and backslashes that escape nothing, are written as Python has them.

    Raises:
        More: the text ends before it does.
        Malformed: the brackets do not match.
    """
    pos, depth, parts = start, [], []
    while found := _PART.search(text, pos):
        mark = found[0]
        parts.append(text[pos : found.end()])
        pos = found.end()
        if mark in _IN_STRING:
            pos, inner = _string_end(text, pos, mark)
            parts.append(inner)
        elif mark in "([{":
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


def python_calls(source: str, tools: Offered) -> list[ToolCall]:
    """The calls in a Python expression: a call, a list of calls, or a list of JSON objects.

    Raises:
        Malformed: it is something else, or its values are none that JSON holds.
    """
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Malformed("it is no call in Python's notation") from error
    items = tree.elts if isinstance(tree, ast.List) else [tree]
    if items and all(isinstance(item, ast.Dict) for item in items):
        return list(calls_of(read_json(source)))
    return [_call(item, tools) for item in items]


def _call(node: ast.expr, tools: Offered) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise Malformed("it has something other than calls with named arguments")
    name = ast.unparse(node.func)
    if name not in tools and name.removesuffix(".call") in tools:  # as Llama calls what Meta trained it with
        name = name.removesuffix(".call")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise Malformed("an argument stands there twice")
        arguments[keyword.arg] = _value(keyword.value)
    try:
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed("JSON cannot hold its arguments") from error
    return ToolCall(name, arguments)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if value is not True:
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [_value(key) if key is not None else None for key in keys]
            if len(set(map(str, names))) == len(names) and all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_value, values), strict=True))
    raise Malformed("it has a value that JSON does not")
