"""Calls that are written like Python's: `[look(at="door"), wait(seconds=2)]`."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.formats.cursor import Cursor, Malformed, More, read_json
from mlx_mcp.chat.formats.format import CallSyntax
from mlx_mcp.chat.formats.grammar import Rules, Spell, json_of, one_of, quoted, sequence
from mlx_mcp.chat.formats.json_calls import call_schema, calls_of
from mlx_mcp.chat.formats.literals import as_json, expression_end, json_or_literal, literal, parsed
from mlx_mcp.chat.formats.offered import Offered
from mlx_mcp.chat.formats.xml_calls import parameters
from mlx_mcp.chat.message import ToolCall

_NAME = re.compile(r"[A-Za-z_][\w.]*")


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

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax; values are JSON, whose strings and constants are read as Python's."""
        required: list[str] = []
        optional: list[str] = []
        for key, value, must in parameters(schema):
            (required if must else optional).append(sequence(quoted(f"{key}="), json_of(value)))
        more = [f'(", " {part})?' for part in optional]
        # Where nothing is required, a comma may only stand behind the argument that was written first.
        inner = ' ", " '.join(required)
        if required:
            inner = sequence(inner, *more)
        elif optional:
            inner = f"{one_of(sequence(part, *more[i + 1 :]) for i, part in enumerate(optional))}?"
        begin, end = ("\n", "\n") if self.lines else ("[", "]")
        opener, after = (spell(self.begin), spell(self.after)) if self.begin else ("", "")
        return rules.add(sequence(opener, quoted(f"{begin}{name}("), inner, quoted(f"){end}"), after))

    def _value(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        if cursor.sees("{"):
            return list(calls_of(json_or_literal(cursor), tools))
        start, named = cursor.pos, _NAME.match(cursor.text, cursor.pos)
        if cursor.at_end or (named and named.end() == len(cursor.text) and not cursor.ended):
            raise More
        bracket = named.end() if named else start
        if not cursor.text.startswith("(" if named else "[", bracket):
            raise Malformed("no call in Python's notation")
        cursor.pos, source = expression_end(cursor.text, bracket)
        return python_calls(cursor.text[start:bracket] + source, tools)


class LlamaCalls(PythonicCalls):
    """What Llama 3 writes: an object with `parameters`; calls of the tools that Meta trained it with are Python's."""

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax."""
        return rules.add(json_of(call_schema("name", name, "parameters", schema)))


def python_calls(source: str, tools: Offered) -> list[ToolCall]:
    """The calls in a Python expression: a call, a list of calls, or a list of JSON objects.

    Raises:
        Malformed: it is something else, or its values are none that JSON holds.
    """
    tree = parsed(source)
    items = tree.elts if isinstance(tree, ast.List) else [tree]
    if items and all(isinstance(item, ast.Dict) for item in items):
        return list(calls_of(read_json(source), tools))
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
        arguments[keyword.arg] = literal(keyword.value)
    return ToolCall(name, as_json(arguments))
