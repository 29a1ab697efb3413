"""JSON with comments and trailing commas: one member put into a text or taken out of it, all else left as it is.

No library of Python that keeps comments also keeps every other byte, so a text is scanned for where its members lie
(160 lines), and one piece of it is replaced.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # reads a string as json.loads does; no stub
from typing import Any

from mlx_mcp.install.texts import BrokenText, Path, Style, UnfitText, line_start, nested, newline_of, place_of

BLANKS = re.compile(r"(?:[ \t\r\n]+|//[^\r\n]*|/\*.*?\*/)*", re.DOTALL)
REST_OF_LINE = re.compile(r"[ \t]*(?:/\*[^\r\n]*?\*/[ \t]*)*(?://[^\r\n]*)?")
WORD = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Node:
    """A value, and from where to where it is written; an object has its members."""

    at: int
    end: int
    value: Any
    members: tuple[Member, ...] | None = None


@dataclass(frozen=True)
class Member:
    """A key, where it begins, and its value."""

    key: str
    at: int
    node: Node


class Scanner:
    """Reads one text from its beginning to its end."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def document(self) -> Node | None:
        """The one value of the text; None if there is nothing but blanks and comments."""
        self.skip()
        if self.at == len(self.text):
            return None
        node = self.node()
        self.skip()
        if self.at < len(self.text):
            raise self.broken("nothing may come after the end of the object")
        return node

    def node(self) -> Node:
        """The value that begins here."""
        at, start = self.at, self.text[self.at : self.at + 1]
        if start == "{":
            members = self.members()
            return Node(at, self.at, {member.key: member.node.value for member in members}, members)
        if start == "[":
            items = self.items()
            return Node(at, self.at, items)
        if start == '"':
            text = self.string()
            return Node(at, self.at, text)
        word = WORD.match(self.text, at)
        if not word:
            raise self.broken("a value is expected")
        self.at = word.end()
        return Node(at, self.at, json.loads(word[0]))

    def members(self) -> tuple[Member, ...]:
        """What an object has between its braces."""
        members: list[Member] = []
        while self.more("}"):
            at = self.at
            if self.text[at : at + 1] != '"':
                raise self.broken("a key in double quotes, or }, is expected")
            key = self.string()
            self.skip()
            if self.text[self.at : self.at + 1] != ":":
                raise self.broken("a colon is expected after the key")
            self.at += 1
            self.skip()
            members.append(Member(key, at, self.node()))
            self.separated("}")
        return tuple(members)

    def items(self) -> list[Any]:
        """What a list has between its brackets."""
        items = []
        while self.more("]"):
            items.append(self.node().value)
            self.separated("]")
        return items

    def more(self, close: str) -> bool:
        """Step over an opening or a comma; whether anything comes before the closing mark, over which it steps too."""
        self.at += 1
        self.skip()
        if self.text[self.at : self.at + 1] != close:
            return True
        self.at += 1
        return False

    def separated(self, close: str) -> None:
        """Go to the comma after a member, or to just before the closing mark, as if a comma were there."""
        self.skip()
        found = self.text[self.at : self.at + 1]
        if found == close:
            self.at -= 1
        elif found != ",":
            raise self.broken(f"a comma or {close} is expected")

    def string(self) -> str:
        """The string that begins here."""
        try:
            value, self.at = scanstring(self.text, self.at + 1, True)
        except json.JSONDecodeError as error:
            raise BrokenText(self.text, error.pos, error.msg) from error
        return str(value)

    def skip(self) -> None:
        """Go past blanks and comments."""
        self.at = skipped(self.text, self.at)
        if self.text.startswith("/*", self.at):
            raise self.broken("this comment does not end")

    def broken(self, what: str) -> BrokenText:
        """The error for here."""
        end = " at the end of the file" if self.at >= len(self.text) else ""
        return BrokenText(self.text, self.at, what + end)


def parse(text: str) -> Node | None:
    """Where everything in a text lies; None if there is nothing but blanks and comments.

    Raises:
        BrokenText: it is no JSON, even with comments and trailing commas.
    """
    try:
        return Scanner(text).document()
    except RecursionError as error:
        raise BrokenText(text, 0, "this is nested too deeply") from error


def load(text: str) -> Any:
    """What a text says; an empty object if it says nothing.

    Raises:
        BrokenText: it is no JSON, even with comments and trailing commas.
    """
    node = parse(text)
    return {} if node is None else node.value


def dump(path: Path, value: Any) -> str:
    """A text that says nothing else."""
    return with_entry("", path, value)


def with_entry(text: str, path: Path, value: Any) -> str:
    """The text with this value at the path: in the place of the one that is there, or as the last of its neighbours.

    Raises:
        BrokenText: the text is no JSON.
        UnfitText: something in the path is no object, or is there twice.
    """
    root, style = parse(text), Style(newline_of(text), "  ")
    if root is None:
        gap = style.newline if text and not text.endswith("\n") else ""
        return text + gap + written(nested(path, value), style, "") + style.newline
    style = Style(style.newline, unit_of(text, root))
    holders, member = found(text, root, path)
    if member is not None:
        shown = written(value, style, indent_at(text, member.at)) if "\n" in text.strip() else compact(value)
        return text[: member.node.at] + shown + text[member.node.end :]
    missing = path[len(holders) - 1 :]
    return inserted(text, holders[-1], missing[0], nested(missing[1:], value), style)


def without_entry(text: str, path: Path) -> str:
    """The text without what is at the path; its holder stays.

    Raises:
        BrokenText: the text is no JSON.
        UnfitText: something in the path is no object, or is there twice.
    """
    root = parse(text)
    holders, member = found(text, root, path) if root is not None else ([], None)
    if member is None:
        return text
    members = holders[-1].members or ()
    place, start, end = members.index(member), member.at, member.node.end
    comma = comma_after(text, end)
    if comma is not None:
        end = comma + 1
    elif place and (comma := comma_after(text, members[place - 1].node.end)) is not None:
        text, start, end = text[:comma] + text[comma + 1 :], start - 1, end - 1
    begin, rest = line_start(text, start), len(text) - len(text[end:].lstrip(" \t"))
    newline = re.compile(r"\r?\n").match(text, rest)
    if newline and not text[begin:start].strip(" \t"):
        start, end = begin, newline.end()
    elif place:
        start = len(text[:start].rstrip(" \t"))
    else:
        end = rest
    text = text[:start] + text[end:]
    left = re.compile(r"\{[ \t\r\n]*\}").match(text, holders[-1].at)
    return text[: left.start()] + "{}" + text[left.end() :] if left else text


def found(text: str, root: Node, path: Path) -> tuple[list[Node], Member | None]:
    """The objects along the path, as far as they are there, and the member at its end, if it is.

    Raises:
        UnfitText: something in the path is no object, or is there twice.
    """
    holders, node, name = [], root, "the whole"
    for depth, key in enumerate(path):
        if node.members is None:
            line, column = place_of(text, node.at)
            raise UnfitText(f"line {line}, column {column}: {name} is no object, as it should be")
        holders.append(node)
        those = [member for member in node.members if member.key == key]
        if not those:
            return holders, None
        if len(those) > 1:
            line, column = place_of(text, those[1].at)
            raise UnfitText(f"line {line}, column {column}: there is a second {key!r}; remove one of them")
        if depth == len(path) - 1:
            return holders, those[0]
        node, name = those[0].node, repr(key)
    return holders, None


def inserted(text: str, holder: Node, key: str, value: Any, style: Style) -> str:
    """The text with one more member at the end of an object."""
    members, outer = holder.members or (), indent_at(text, holder.at)
    if members:
        last = members[-1]
        comma = comma_after(text, last.node.end)
        after, mark = (last.node.end, "") if comma is None else (comma + 1, ",")
        head = text[: last.node.end] + ("," if comma is None else text[last.node.end : after])
        if "\n" not in text[holder.at : members[0].at]:
            return f"{head} {json.dumps(key, ensure_ascii=False)}: {compact(value)}{mark}{text[after:]}"
        rest = REST_OF_LINE.match(text, after)
        stop = rest.end() if rest and text[rest.end() : rest.end() + 1] in ("\r", "\n") else after
        inner = indent_at(text, last.at)
        return head + text[after:stop] + member_of(key, value, style, inner) + mark + text[stop:]
    inner = outer + style.unit
    inside = text[holder.at + 1 : holder.end - 1]
    stop = holder.at + 1 + len(inside.rstrip())
    if not inside.strip():
        if "\n" not in text.strip() and text.strip() != text[holder.at : holder.end]:
            shown = f"{json.dumps(key, ensure_ascii=False)}: {compact(value)}"
            return text[: holder.at + 1] + shown + text[holder.end - 1 :]
        stop, close = holder.at + 1, style.newline + outer
        return text[:stop] + member_of(key, value, style, inner) + close + text[holder.end - 1 :]
    close = "" if "\n" in text[stop : holder.end] else style.newline + outer
    return text[:stop] + member_of(key, value, style, inner) + close + text[stop:]


def member_of(key: str, value: Any, style: Style, indent: str) -> str:
    """A member on lines of its own, with the line ending before them."""
    return f"{style.newline}{indent}{json.dumps(key, ensure_ascii=False)}: {written(value, style, indent)}"


def written(value: Any, style: Style, indent: str) -> str:
    """A value on several lines, of which all but the first are indented by so much and more."""
    lines = json.dumps(value, indent=style.unit, ensure_ascii=False).split("\n")
    return (style.newline + indent).join(lines)


def compact(value: Any) -> str:
    """A value on one line."""
    return json.dumps(value, ensure_ascii=False)


def skipped(text: str, at: int) -> int:
    """Where blanks and comments from an offset on end."""
    blanks = BLANKS.match(text, at)
    return blanks.end() if blanks else at


def comma_after(text: str, at: int) -> int | None:
    """Where the comma after a member is, if there is one."""
    at = skipped(text, at)
    return at if text[at : at + 1] == "," else None


def indent_at(text: str, at: int) -> str:
    """The blanks at the beginning of the line of an offset."""
    start = line_start(text, at)
    return text[start : len(text) - len(text[start:].lstrip(" \t"))]


def unit_of(text: str, root: Node) -> str:
    """What the members of the whole are indented by; two spaces if they are not on lines of their own."""
    first = root.members[0] if root.members else None
    if first is None or "\n" not in text[root.at : first.at]:
        return "  "
    return indent_at(text, first.at).removeprefix(indent_at(text, root.at)) or "  "
