"""TOML: one table put into a text or taken out of it, all else left as it is.

A table is appended, and taken out line by line, since a comment above the next table is to stay, which tomlkit would
remove with ours. What came of it is parsed, and refused if it does not say what it should.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from mlx_mcp.install.texts import (
    BrokenText,
    Path,
    UnfitText,
    line_end,
    newline_of,
    same,
    value_at,
    with_value,
    without_value,
)

WHERE = re.compile(r"\(at (?:line (\d+), column (\d+)|end of document)\)")
BARE = re.compile(r"[A-Za-z0-9_-]+")


def load(text: str) -> Any:
    """What a text says.

    Raises:
        BrokenText: it is no TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where, at = WHERE.search(str(error)), len(text)
        if where and where[1]:
            lines = text.splitlines(keepends=True)
            at = sum(map(len, lines[: int(where[1]) - 1])) + int(where[2]) - 1
        raise BrokenText(text, at, WHERE.sub("", str(error)).strip()) from error
    except RecursionError as error:
        raise BrokenText(text, 0, "this is nested too deeply") from error


def dump(path: Path, value: Any) -> str:
    """A text that says nothing else."""
    return with_entry("", path, value)


def with_entry(text: str, path: Path, value: Any) -> str:
    """The text with a table at the path, as its end, and without one that was there before.

    Raises:
        BrokenText: the text is no TOML.
        UnfitText: tables cannot be added here, or the one that is there cannot be taken out.
    """
    wanted, text = with_value(load(text), path, value), without_entry(text, path)
    newline = newline_of(text)
    gap = "" if not text.strip("\r\n") else newline if text.endswith("\n") else 2 * newline
    after = text + gap + newline.join(table(path, value)) + newline
    return proved(after, wanted, path)


def without_entry(text: str, path: Path) -> str:
    """The text without the table at the path, and the tables in it.

    Raises:
        BrokenText: the text is no TOML.
        UnfitText: it cannot be taken out.
    """
    data = load(text)
    if value_at(data, path) is None:
        return text
    wanted, heads = without_value(data, path), headers(text)
    after, end = text, len(text)
    for at, of in reversed(heads):
        if list(of[: len(path)]) == list(path):
            after = without_lines(after, at, end)
        end = at
    if value_at(load(after), path[:-1]) is None:  # ours was the last, and its holder had no header of its own
        wanted = without_value(wanted, path[:-1]) if len(path) > 1 else wanted
    return proved(after, wanted, path)


def proved(after: str, wanted: Any, path: Path) -> str:
    """The text, if it says what it should.

    Raises:
        UnfitText: it does not.
    """
    try:
        if same(load(after), wanted):
            return after
    except BrokenText:  # such as a table that would be added to one within braces
        pass
    raise UnfitText(f"{'.'.join(path)} is not written as a table with a header of its own")


def without_lines(text: str, start: int, end: int) -> str:
    """The text without the lines of a table; blank lines and comments at its end belong to what comes next."""
    lines = text[start:end].splitlines(keepends=True)
    while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    head, tail = text[:start], text[start + sum(map(len, lines)) :]
    if not tail.strip("\r\n"):  # nothing is left for which the blank line before the table would be
        return head.rstrip("\r\n") + newline_of(text) if head.strip("\r\n") else ""
    return head + tail.lstrip("\r\n") if not head.strip("\r\n") or head.endswith(("\n\n", "\n\r\n")) else head + tail


def headers(text: str) -> list[tuple[int, tuple[str, ...]]]:
    """Where the headers of tables begin, and their keys."""
    found, at = [], 0
    while at < len(text):
        end = line_end(text, at)
        if text[at:end].lstrip().startswith("["):
            try:
                tomllib.loads(text[:at])
                data: Any = tomllib.loads(text[at:end])
            except tomllib.TOMLDecodeError:  # the line is within a list or a text
                data = None
            keys: list[str] = []
            while isinstance(data, (dict, list)) and data:
                key, data = (None, data[0]) if isinstance(data, list) else next(iter(data.items()))
                keys += [] if key is None else [key]
            if keys:
                found.append((at, tuple(keys)))
        at = end
    return found


def table(path: Path, value: dict[str, Any]) -> list[str]:
    """The lines of a table, and of the tables in it."""
    lines = [f"[{'.'.join(map(key_of, path))}]"]
    lines += [f"{key_of(key)} = {scalar(each)}" for key, each in value.items() if not isinstance(each, dict)]
    for key, each in value.items():
        if isinstance(each, dict):
            lines += ["", *table([*path, key], each)]
    return lines


def key_of(key: str) -> str:
    """A key as TOML has it."""
    return key if BARE.fullmatch(key) else scalar(key)


def scalar(value: Any) -> str:
    """A text, number, truth value or list of these; JSON's escapes are TOML's, which also escapes DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
