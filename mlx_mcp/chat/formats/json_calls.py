"""Calls whose arguments are JSON: objects with a name in them, and names that stand before their arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.formats.cursor import Cursor, Malformed, More, read_json
from mlx_mcp.chat.formats.format import CallSyntax
from mlx_mcp.chat.formats.grammar import Rules, Spell, json_of, quoted, sequence
from mlx_mcp.chat.formats.literals import fenced_value, json_or_literal
from mlx_mcp.chat.formats.offered import Offered
from mlx_mcp.chat.message import ToolCall

NAMES = ("name", "tool_name", "function", "function_name", "tool")
ARGUMENTS = ("arguments", "parameters", "args", "input", "params", "function_args", "kwargs")
IDS = ("id", "tool_call_id", "call_id")


@dataclass(frozen=True, kw_only=True)
class JsonCalls(CallSyntax):
    """JSON objects, or lists of them: `<tool_call>{"name": "look", "arguments": {"at": "door"}}</tool_call>`.

    `keys` are the family's words for a name and for arguments; others' are taken too, as long as there is one name and
    one object of arguments, and nothing that would be lost. `keyed` means that a name may be the only key of its
    object, and `listed` that the family writes lists.
    """

    keys: tuple[str, str] = ("name", "arguments")
    keyed: bool = False
    listed: bool = False

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        opener = self.take_opener(cursor)
        if opener.endswith(("[", "{")):
            cursor.pos -= 1
        values = [fenced_value(cursor)]
        if opener and self.after:
            cursor.space()
            while cursor.sees(",") or cursor.sees("{"):
                cursor.skip(",")
                cursor.space()
                values.append(json_or_literal(cursor))
                cursor.space()
            self.take_after(cursor)
        return [call for value in values for call in calls_of(value, tools, self.keyed)]

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax."""
        call = call_schema(self.keys[0], name, self.keys[1], schema)
        if self.keyed:
            call = object_of({name: schema})
        opener = next(iter(self.openers), "").removesuffix("[")
        value = list_of(call) if self.listed else call
        return rules.add(
            sequence(spell(opener) if opener else "", json_of(value), spell(self.after) if self.after else "")
        )


@dataclass(frozen=True, kw_only=True)
class NamedCalls(CallSyntax):
    """Calls that name the tool first and its arguments, as JSON, behind a marker: `[TOOL_CALLS]look[ARGS]{…}`.

    Between the name and the marker `args` there may be an id behind the marker `call_id`; or an id stands first, and
    the name behind the marker `named`. Where the word `kind` stands in the place of the name, the name follows in a
    line of its own, and then the arguments in a fence; `fenced` says that the family writes so. All models of such
    families also read calls as JSON objects in a list, and where `listed` is set write them so.
    """

    args: str
    fenced: bool = False
    listed: bool = False
    call_id: str = ""
    named: str = ""
    kind: str = ""

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        self.take_opener(cursor)
        cursor.space()
        if cursor.sees("[") or cursor.sees("{"):  # as older models of the family write
            calls = list(calls_of(json_or_literal(cursor), tools))
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
        arguments = arguments_of(fenced_value(cursor))
        self.take_after(cursor)
        return [self.call(name, arguments, call_id)]

    def call(self, name: str, arguments: dict[str, Any], call_id: str) -> ToolCall:
        """The call, from what is written for its parts."""
        return ToolCall(name, arguments, call_id)

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax."""
        head = [spell(self.openers[0]), *([spell(f"0{self.named}")] if self.named else [])]
        after = spell(self.after) if self.after else ""
        if self.listed:
            return rules.add(sequence(*head, json_of(list_of(call_schema("name", name, "arguments", schema))), after))
        if self.fenced:
            fence = f"{self.kind}{self.args}{name}\n```json\n"
            return rules.add(sequence(*head, spell(fence), json_of(schema), quoted("\n```"), after))
        return rules.add(sequence(*head, spell(self.written(name) + self.args), json_of(schema), after))

    def written(self, name: str) -> str:
        """What is written for the name of a tool."""
        return name


class KimiCalls(NamedCalls):
    """Calls whose id stands in the place of the name, and has the name in it: `functions.look:0`."""

    def call(self, name: str, arguments: dict[str, Any], call_id: str) -> ToolCall:
        """See NamedCalls."""
        tool, _, index = name.removeprefix("functions.").rpartition(":")
        return ToolCall(tool if index.isdigit() else name.removeprefix("functions."), arguments, name)

    def written(self, name: str) -> str:
        """See NamedCalls."""
        return f"functions.{name}:0"


def object_of(parts: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that has these parts, in this order, and nothing else."""
    return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def list_of(item: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list of one item."""
    return {"type": "array", "items": item, "minItems": 1, "maxItems": 1}


def call_schema(name_key: str, name: str, arguments_key: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that says a call."""
    return object_of({name_key: {"const": name}, arguments_key: schema})


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


def calls_of(value: Any, tools: Offered, keyed: bool = False) -> Iterator[ToolCall]:
    """The calls in a JSON object or a list of them; with `keyed`, the name of a tool may be the only key.

    Raises:
        Malformed: one of them is no call.
    """
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            raise Malformed("no object in a list of calls")
        name = next(iter(item), "")
        if keyed and len(item) == 1 and name in tools:
            yield ToolCall(name, arguments_of(item[name]))
        else:
            yield call_of(item, tools)


def call_of(item: dict[str, Any], tools: Offered) -> ToolCall:
    """The call that a JSON object says.

    Raises:
        Malformed: it names no tool, or has something that would be lost.
    """
    if isinstance(item.get("function"), dict) and not set(item) - {"function", "type", "index", *IDS}:
        call = call_of(item["function"], tools)
        return ToolCall(call.name, call.arguments, call.call_id or identity(item))
    names = [key for key in NAMES if isinstance(item.get(key), str)]
    if item.get("type") == "function" and "function" in names and len(names) > 1:
        names.remove("function")
    given = [key for key in ARGUMENTS if key in item]
    rest = {key: item[key] for key in item if key not in {*names, *given, *IDS, "type", "index"}}
    if names and not given and rest and set(item) - {names[0]} <= set(tools.parameters(item[names[0]])):
        return ToolCall(item[names[0]], {key: item[key] for key in item if key != names[0]})
    if len(names) != 1 or len(given) > 1:
        raise Malformed("no name, or more than one")
    if rest:
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
