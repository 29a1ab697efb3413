"""Calls that are written like XML: one element for each argument, with the value as it is."""

from __future__ import annotations

import html
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mlx_mcp.chat.formats.cursor import Cursor, Malformed, More
from mlx_mcp.chat.formats.format import CallSyntax, Marks
from mlx_mcp.chat.formats.grammar import Rules, Spell, json_of, one_of, quoted, sequence
from mlx_mcp.chat.formats.json_calls import arguments_of, call_of, calls_of, header
from mlx_mcp.chat.formats.offered import Offered, types_of
from mlx_mcp.chat.message import ToolCall

_ATTRIBUTE = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>/]+))""")
_CDATA = re.compile(r"\s*<!\[CDATA\[(.*)\]\]>\s*", re.DOTALL)
NO_BLOCK = Marks("", "")


@dataclass(frozen=True, kw_only=True)
class XmlCalls(CallSyntax):
    """One element for the call and one for each argument: `<function=look><parameter=at>door</parameter></function>`.

    Names follow the beginning of a tag as `=name` or as an attribute, up to `close`. `padded` says that a line break
    stands before and behind each value. `escaped` says that names are written with entities. All arguments may stand
    in one `block` as a JSON object instead.
    """

    parameter: Marks
    block: Marks = NO_BLOCK
    close: str = ">"
    padded: bool = False
    escaped: bool = False

    @property
    def behind(self) -> tuple[str, ...]:
        """What may stand behind a call in a section; empty if there are no sections."""
        return (*self.openers, *(section.end for section in self.sections)) if self.sections else ()

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        opener = self.take_opener(cursor)
        if not opener:  # as related models write
            return list(calls_of(cursor.json(), tools))
        attributes, empty = self._attributes(cursor, opener)
        name = attributes.get("name") or attributes.get("tool") or ""
        arguments: dict[str, Any] = {}
        while not empty:
            cursor.space()
            if cursor.skip(self.after):
                break
            if self.block.begin and not arguments and cursor.skip(self.block.begin):
                arguments = arguments_of(cursor.json())
                cursor.space()
                cursor.take(self.block.end)
                continue
            cursor.take(self.parameter.begin)
            key, value = self._argument(cursor, name, tools, arguments)
            if key in arguments:
                raise Malformed("an argument stands there twice")
            arguments[key] = value
        return [ToolCall(name, arguments)]

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax."""
        if self.close != ">":  # whose markers are tokens, so that texts cannot be kept apart from them
            return None
        opener, padding = self.openers[0], "\n" if self.padded else ""
        head = opener + (quoted(name) if opener.endswith("name=") else name) + self.close
        parts = []
        for key, value, required in parameters(schema):
            attribute = f"={key}" if opener.endswith("function=") else f" name={quoted(key)}"
            begin = spell(f"{self.parameter.begin}{attribute}{self.close}{padding}")
            content = value_rule(rules, value, self.parameter.end, spell, self.parameter.begin)
            rule = rules.add(sequence(begin, content, quoted("\n")))
            parts.append(rule if required else f"{rule}?")
        return rules.add(sequence(spell(f"{head}\n"), *parts, spell(self.after)))

    def _argument(self, cursor: Cursor, tool: str, tools: Offered, given: Collection[str]) -> tuple[str, Any]:
        attributes, empty = self._attributes(cursor)
        key = attributes.get("name") or attributes.get("key") or ""
        if not key:
            raise Malformed("an argument has no name")
        given = {*given, key}
        others = [f"{self.parameter.begin}={name}{self.close}" for name in tools.parameters(tool) if name not in given]
        followers = Followers(self.parameter.begin, self.after, self.behind)
        types = types_of(tools.schema(tool, key))
        written = "" if empty else element_value(cursor, self.parameter, followers, others, types)
        if self.padded:
            written = written.removeprefix("\n").removesuffix("\n")
        if found := _CDATA.fullmatch(written):
            return key, found[1]
        said = {"true": True, "false": False}.get(attributes.get("string", ""))
        if "type" in attributes:
            said = attributes["type"] == "string"
        return key, tools.value(tool, key, written, said)

    def _attributes(self, cursor: Cursor, opener: str = "") -> tuple[dict[str, str], bool]:
        """What stands in a tag behind its opener, and whether the element is empty."""
        start = cursor.pos
        try:
            inner = cursor.until(self.close)
        except More:
            check_tag(cursor.text[start:])
            raise
        check_tag(inner)
        cursor.take(self.close)
        if opener.endswith("=") or inner.startswith("="):
            name = inner.removeprefix("=").removesuffix("/").strip().strip("\"'")
            return {"name": name}, inner.endswith("/")
        found = {key: next(filter(None, values), "") for key, *values in _ATTRIBUTE.findall(inner)}
        if not found:
            raise Malformed("no tag of a call")
        if self.escaped:
            found = {key: html.unescape(value) for key, value in found.items()}
        return found, inner.endswith("/")


@dataclass(frozen=True, kw_only=True)
class PairCalls(CallSyntax):
    """A name, and then keys and values in turns: `<tool_call>look<arg_key>at</arg_key><arg_value>door</arg_value>…`.

    `separator` may stand behind the name.
    """

    key: Marks
    value: Marks
    separator: str = ""

    def read(self, cursor: Cursor, tools: Offered) -> list[ToolCall]:
        """See CallSyntax."""
        self.take_opener(cursor)
        cursor.space()
        if cursor.sees("{"):  # as older models of the family write
            call = call_of(cursor.json(), tools)
            self.take_after(cursor)
            return [call]
        name = self._name(cursor)
        arguments: dict[str, Any] = {}
        while not cursor.skip(self.after):
            cursor.take(self.key.begin)
            key = cursor.until(self.key.end).strip()
            cursor.take(self.key.end)
            cursor.space()
            cursor.take(self.value.begin)
            types, given = types_of(tools.schema(name, key)), {*arguments, key}
            later = [f"{self.key.begin}{other}{self.key.end}" for other in tools.parameters(name) if other not in given]
            written = element_value(cursor, self.value, Followers(self.key.begin, self.after), later, types)
            if key in arguments:
                raise Malformed("an argument stands there twice")
            arguments[key] = tools.value(name, key, written)
            cursor.space()
        return [ToolCall(name, arguments)]

    def rule(self, rules: Rules, name: str, schema: dict[str, Any], spell: Spell) -> str | None:
        """See CallSyntax."""
        parts = []
        for key, value, required in parameters(schema):
            begin = sequence(spell(self.key.begin), spell(key), spell(self.key.end), spell(self.value.begin))
            rule = rules.add(
                sequence(begin, value_rule(rules, value, self.value.end, spell, self.key.begin, self.value.begin))
            )
            parts.append(rule if required else f"{rule}?")
        separator = spell(self.separator) if self.separator else ""
        return rules.add(sequence(spell(self.openers[0]), spell(name), separator, *parts, spell(self.after)))

    def _name(self, cursor: Cursor) -> str:
        name = header(cursor, self.key.begin, self.after, *filter(None, [self.separator]))
        if self.separator:
            cursor.skip(self.separator)
        cursor.space()
        return name


def parameters(schema: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """The parameters of a tool: name, schema, and whether it must be there."""
    properties, required = schema.get("properties"), schema.get("required")
    properties = properties if isinstance(properties, dict) else {}
    return [(key, value, key in (required if isinstance(required, list) else [])) for key, value in properties.items()]


def value_rule(rules: Rules, schema: Any, end: str, spell: Spell, *begins: str) -> str:
    """A value as elements have it, and its end marker: strings as they are, and JSON for everything else.

    A string has none of `begins` in it, so that nobody can take the value for a longer one.
    """
    if types_of(schema) != {"string"}:
        return sequence(json_of(schema), spell(end))
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    return sequence(one_of(map(quoted, choices)), spell(end)) if choices else rules.text_to(end, spell, *begins)


def check_tag(inner: str) -> None:
    """See that a text can stand within a tag.

    Raises:
        Malformed: it cannot.
    """
    if len(inner) > 1000 or "\n" in inner:
        raise Malformed("no tag")


@dataclass(frozen=True)
class Followers:
    """What stands behind a value: the `next` argument, or `after`, the end of the call.

    Where calls stand in sections, `behind` is what then comes: a value may name the ends of a value and of a call.
    """

    next: str
    after: str
    behind: tuple[str, ...] = ()

    def may_stand(self, cursor: Cursor) -> bool:
        """Whether a follower stands here, behind white space; the cursor goes to it."""
        cursor.space()
        return cursor.sees(self.next) or cursor.sees(self.after)

    def surely_stand(self, cursor: Cursor) -> bool:
        """Whether what stands here is no part of a value."""
        if cursor.sees(self.next) or not self.behind:
            return True
        cursor.take(self.after)
        cursor.space()
        return cursor.at_end or any(cursor.sees(marker) for marker in self.behind)


def element_value(cursor: Cursor, tag: Marks, followers: Followers, later: Collection[str], types: set[str]) -> str:
    """What is written for a value of these types, up to behind its end marker.

    In an object or array the marker may stand in a string. For other parameters see `raw_value`.

    Raises:
        More: the value goes on.
    """
    if types and "string" not in types:
        value = Cursor(cursor.text, cursor.pos, cursor.ended, cursor.cut)
        try:
            value.space()
            value.json()
            value.space()
            value.take(tag.end)
        except More:
            if not cursor.ended:
                raise
        except Malformed:
            pass
        else:
            return _up_to(cursor, value.pos - len(tag.end), tag.end)
    return raw_value(cursor, tag, followers, later)


def raw_value(cursor: Cursor, tag: Marks, followers: Followers, later: Collection[str] = ()) -> str:
    """Everything up to the end of a value, which may have markers in it, and whole calls; the cursor goes behind it.

    The value ends at an end marker after which its followers stand. Elements of the same kind within the value
    are skipped with their ends. At the end of an answer, what can mean one thing only is taken: a value without an end
    marker before one of the openings in `later`, or before the last follower, and an opening marker in the value.

    Raises:
        More: the value goes on.
    """
    text, depth, pos, ends = cursor.text, 0, cursor.pos, []
    while (end := text.find(tag.end, pos)) >= 0:
        depth += text.count(tag.begin, pos, end)
        pos = end + len(tag.end)
        probe = Cursor(text, pos, cursor.ended)
        if followers.may_stand(probe):
            if depth == 0 and followers.surely_stand(probe):
                return _up_to(cursor, end, tag.end)
            ends.append(end)
        depth = max(depth - 1, 0)
    if cursor.ended and not cursor.cut:
        return _only_reading(cursor, tag, followers, later, ends)
    raise More


def _only_reading(cursor: Cursor, tag: Marks, followers: Followers, later: Collection[str], ends: list[int]) -> str:
    """A value whose markers do not match, where that can mean one thing only; `ends` are where it could end.

    Raises:
        More: it can mean several things.
    """
    text, start = cursor.text, cursor.pos
    first = text.find(tag.end, start)
    openings = [at for opening in later if text.count(opening, start) == 1 and (at := text.find(opening, start)) >= 0]
    if openings and not 0 <= first < min(openings):  # its end marker is missing
        return _up_to(cursor, min(openings), "")
    for end in ends:  # an opening marker in it is only named, so that behind it all markers match
        value, matched = text[start:end], text.count(tag.begin, end) == text.count(tag.end, end + len(tag.end))
        opens = f"\n{tag.begin}" in value or (followers.next != tag.begin and followers.next in value)
        if matched and not opens:
            return _up_to(cursor, end, tag.end)
    rest = text[start:]
    if first < 0 and tag.begin not in rest and rest.count(followers.after) == 1:
        return _up_to(cursor, text.find(followers.after, start), "")
    raise More


def _up_to(cursor: Cursor, end: int, marker: str) -> str:
    start, cursor.pos = cursor.pos, end + len(marker)
    return cursor.text[start:end]
