"""Calls whose arguments are JSON: objects with a name in them, and names that stand before their arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.formats.cursor import Cursor, Malformed, More, read_json
from mlx_mcp.chat.formats.format import CallSyntax
from mlx_mcp.chat.formats.offered import Offered
from mlx_mcp.chat.message import ToolCall

NAMES = ("name", "tool_name", "function", "function_name", "tool")
ARGUMENTS = ("arguments", "parameters", "args", "input", "params", "function_args", "kwargs")
IDS = ("id", "tool_call_id", "call_id")
FENCES = ("```json", "```")  # which some models write around JSON


@dataclass(frozen=True, kw_only=True)
class JsonCalls(CallSyntax):
    """JSON objects, or lists of them: `<tool_call>{"name": "look", "arguments": {"at": "door"}}</tool_call>`.

    `keyed` means that a name may be the only key of its object. Other families' words for the keys are taken, as long
    as there is one name and one object of arguments, and nothing that would be lost.
    """

    keyed: bool = False

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        opener = self.take_opener(cursor)
        if opener.endswith(("[", "{")):
            cursor.pos -= 1
        values = [fenced_json(cursor)]
        if opener and self.after:
            cursor.space()
            while cursor.sees(",") or cursor.sees("{"):
                cursor.skip(",")
                cursor.space()
                values.append(cursor.json())
                cursor.space()
            self.take_after(cursor)
        return [call for value in values for call in calls_of(value, tools if self.keyed else None)]


@dataclass(frozen=True, kw_only=True)
class NamedCalls(CallSyntax):
    """Calls that name the tool first and its arguments, as JSON, behind a marker: `[TOOL_CALLS]look[ARGS]{…}`.

    Between the name and the marker `args` there may be an id behind the marker `call_id`; or an id stands first, and
    the name behind the marker `named`. Where the word `kind` stands in the place of the name, the name follows in a
    line of its own, and then the arguments in a fence.
    """

    args: str
    call_id: str = ""
    named: str = ""
    kind: str = ""

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        self.take_opener(cursor)
        cursor.space()
        if cursor.sees("[") or cursor.sees("{"):  # as older models of the family write
            calls = list(calls_of(cursor.json()))
            self.take_after(cursor)
            return calls
        call_id = ""
        if self.named:
            call_id = header(cursor, self.named)
            cursor.take(self.named)
        name = header(cursor, *filter(None, [self.args, self.call_id]))
        if self.call_id and cursor.skip(self.call_id):
            call_id = header(cursor, self.args)
        cursor.take(self.args)
        cursor.space()
        if self.kind and name == self.kind and not cursor.sees("{"):
            name = header(cursor, "\n")
        arguments = arguments_of(fenced_json(cursor))
        self.take_after(cursor)
        return [self.call(name, arguments, call_id)]

    def call(self, name: str, arguments: dict[str, Any], call_id: str) -> ToolCall:
        """The call, from what is written for its parts."""
        return ToolCall(name, arguments, call_id)


class KimiCalls(NamedCalls):
    """Calls whose id stands in the place of the name, and has the name in it: `functions.look:0`."""

    def call(self, name: str, arguments: dict[str, Any], call_id: str) -> ToolCall:
        """See NamedCalls."""
        tool, _, index = name.removeprefix("functions.").rpartition(":")
        return ToolCall(tool if index.isdigit() else name.removeprefix("functions."), arguments, name)


def fenced_json(cursor: Cursor) -> Any:
    """A JSON object or array, which may stand in a fence."""
    cursor.space()
    fenced = any(cursor.skip(fence) for fence in FENCES)
    cursor.space()
    value = cursor.json()
    if fenced:
        cursor.space()
        cursor.skip("```")
    return value


def header(cursor: Cursor, *ends: str) -> str:
    """A name or an id, which is short and has no brackets; the cursor stands at the marker after it."""
    start = cursor.pos
    try:
        name = cursor.until(*ends)
    except More:
        check_name(cursor.without_part_of(start, ends))
        raise
    return check_name(name)


def check_name(name: str) -> str:
    """The name without white space around it.

    Raises:
        Malformed: nobody would call a tool so.
    """
    name = name.strip()
    if len(name) > 200 or any(char in "{}<>\"'" or char.isspace() for char in name):
        raise Malformed("no name of a tool")
    return name


def calls_of(value: Any, keyed: Offered | None = None) -> Iterator[ToolCall]:
    """The calls in a JSON object or a list of them; with `keyed`, the name of one of these tools may be the only key.

    Raises:
        Malformed: one of them is no call.
    """
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            raise Malformed("no object in a list of calls")
        name = next(iter(item), "")
        if keyed is not None and len(item) == 1 and name in keyed:
            yield ToolCall(name, arguments_of(item[name]))
        else:
            yield call_of(item)


def call_of(item: dict[str, Any]) -> ToolCall:
    """The call that a JSON object says.

    Raises:
        Malformed: it names no tool, or has something that would be lost.
    """
    if isinstance(item.get("function"), dict) and not set(item) - {"function", "type", "index", *IDS}:
        call = call_of(item["function"])
        return ToolCall(call.name, call.arguments, call.call_id or identity(item))
    names = [key for key in NAMES if isinstance(item.get(key), str)]
    if item.get("type") == "function" and "function" in names and len(names) > 1:
        names.remove("function")
    given = [key for key in ARGUMENTS if key in item]
    if len(names) != 1 or len(given) > 1:
        raise Malformed("no name, or more than one")
    if set(item) - {*names, *given, *IDS, "type", "index"}:
        raise Malformed("more than a name and arguments")
    return ToolCall(item[names[0]], arguments_of(item[given[0]] if given else {}), identity(item))


def identity(item: dict[str, Any]) -> str:
    """The id that a call has; empty if it has none."""
    found = [str(item[key]) for key in IDS if isinstance(item.get(key), str | int)]
    return found[0] if found else ""


def arguments_of(given: Any) -> dict[str, Any]:
    """Arguments as an object; null and an empty text mean none, and a JSON text is what it says.

    Raises:
        Malformed: they are no object.
    """
    if isinstance(given, str) and given.strip():
        given = read_json(given.strip())
    if given is None or given == "":
        return {}
    if not isinstance(given, dict):
        raise Malformed("the arguments are no object")
    return given
