"""YAML: one member put into a text or taken out of it, all else left as it is: comments, anchors, quotes.

PyYAML says where everything lies. Of the ways to write a change, the first is taken after which the text says what it
should and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from mlx_mcp.install.texts import (
    BrokenText,
    Path,
    UnfitText,
    line_end,
    line_start,
    nested,
    newline_of,
    same,
    value_at,
    with_value,
    without_value,
)


def load(text: str) -> Any:
    """What a text says; an empty mapping if it says nothing.

    Raises:
        BrokenText: it is no YAML of one document, or has tags that only its program knows.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BrokenText(text, mark.index if mark else 0, error.problem or error.context or "no YAML") from error
    except yaml.YAMLError as error:
        at = getattr(error, "position", 0)
        raise BrokenText(text, at, getattr(error, "reason", "no YAML")) from error
    except RecursionError as error:
        raise BrokenText(text, 0, "this is nested too deeply") from error
    return {} if data is None else data


def dump(path: Path, value: Any) -> str:
    """A text that says nothing else."""
    return with_entry("", path, value)


def with_entry(text: str, path: Path, value: Any) -> str:
    """The text with this value at the path, without one that was there before.

    Raises:
        BrokenText: the text is no YAML.
        UnfitText: the value cannot be put there without a change of something else.
    """
    load(text)
    text = without_entry(text, path)
    return first_that_says(with_value(load(text), path, value), ways_in(text, path, value), path)


def without_entry(text: str, path: Path) -> str:
    """The text without what is at the path; its holder stays.

    Raises:
        BrokenText: the text is no YAML.
        UnfitText: it cannot be taken out without a change of something else.
    """
    data = load(text)
    if value_at(data, path) is None:
        return text
    return first_that_says(without_value(data, path), ways_out(text, path), path)


def first_that_says(wanted: Any, texts: Iterable[str], path: Path) -> str:
    """The first of these texts that says what it should.

    Raises:
        UnfitText: none does.
    """
    for text in texts:
        try:
            if same(load(text), wanted):
                return text
        except BrokenText:  # another way may do
            continue
    raise UnfitText(f"{'.'.join(path)} is not written so that it can be edited, such as an alias")


def ways_in(text: str, path: Path, value: Any) -> Iterator[str]:
    """Texts with the value added, the best first; not all of them are sound."""
    root, newline = yaml.compose(text, yaml.SafeLoader), newline_of(text)
    holder, parent, depth = reached(root, path)
    name, inner = path[depth], nested(path[depth + 1 :], value)
    column = parent.start_mark.column + 2 if parent is not None else 0
    if not isinstance(holder, yaml.MappingNode):
        if parent is None:  # there is nothing but comments
            yield appended(text, block({name: inner}, 0, newline), newline)
            return
        end = line_end(text, parent.end_mark.index)
        yield appended(text[:end], block({name: inner}, column, newline), newline) + text[end:]
        if holder is not None:
            flow = json.dumps({name: inner}, ensure_ascii=False)
            yield text[: holder.start_mark.index] + flow + text[holder.end_mark.index :]
        return
    start, end = holder.start_mark.index, holder.end_mark.index
    if not holder.value and parent is not None and not text[end : line_end(text, end)].strip():
        yield (
            appended(text[:start].rstrip(" "), block({name: inner}, column, newline), newline)
            + text[line_end(text, end) :]
        )
    if holder.flow_style:
        member = json.dumps({name: inner}, ensure_ascii=False)[1:-1]
        for gap in (", ", " ", "") if holder.value else ("",):
            yield text[: end - 1].rstrip() + gap + member + text[end - 1 :]
        return
    first = holder.value[0][0].start_mark
    shown = block({name: inner}, first.column, newline)
    if parent is None:
        yield appended(text, shown, newline)
    else:
        after = line_end(text, parent.end_mark.index)
        yield text[:after] + shown + text[after:]
    yield text[: line_start(text, first.index)] + shown + text[line_start(text, first.index) :]


def ways_out(text: str, path: Path) -> Iterator[str]:
    """Texts with the member at the path taken out, the best first; not all of them are sound."""
    root, newline = yaml.compose(text, yaml.SafeLoader), newline_of(text)
    holder, _, _ = reached(root, path[:-1])
    members = holder.value if isinstance(holder, yaml.MappingNode) else []
    for place, (key, value) in enumerate(members):
        if key.value != path[-1]:
            continue
        start, end = key.start_mark.index, last_index(value)
        if holder.flow_style:
            for before, after in ((", ", ""), (",", ""), ("", ", "), ("", ","), ("", "")):
                head, tail = text[:start], text[end:]
                if head.endswith(before) and tail.startswith(after):
                    yield head.removesuffix(before) + tail.removeprefix(after)
            return
        begin = line_start(text, start)
        stop = end if end > start and text[end - 1] == "\n" else line_end(text, end)
        left = "" if len(members) > 1 else " " * key.start_mark.column + "{}" + newline
        yield text[:begin] + left + text[stop:]
        if place + 1 < len(members):
            yield text[:begin] + left + text[line_start(text, members[place + 1][0].start_mark.index) :]


def reached(root: Any, path: Path) -> tuple[Any, Any, int]:
    """The node to which keys lead as far as they are there, the key before it, and how many of them are."""
    node, parent = root, None
    for depth, name in enumerate(path):
        members = node.value if isinstance(node, yaml.MappingNode) else []
        those = [(key, value) for key, value in members if key.value == name]
        if not those:
            return node, parent, depth
        parent, node = those[-1]
    return node, parent, len(path)


def last_index(node: Any) -> int:
    """Where a node's own text ends, without the comments after it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return last_index(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def block(value: Any, column: int, newline: str) -> str:
    """The lines of a value, indented by so many columns."""
    lines = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**6).splitlines()
    return "".join(f"{' ' * column}{line}{newline}" if line else newline for line in lines)


def appended(text: str, lines: str, newline: str) -> str:
    """A text with lines after it."""
    return text + ("" if not text or text.endswith("\n") else newline) + lines
