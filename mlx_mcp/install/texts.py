"""What is common to the languages of configuration files: errors with a place, and how two values are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_mcp.errors import InstallError

Path = Sequence[str]  # the keys that lead to a value


class BrokenText(InstallError):
    """A text is not what its language allows; says at which line and column, both counted from 1."""

    def __init__(self, text: str, at: int, what: str) -> None:
        self.line, self.column, self.what = *place_of(text, at), what
        super().__init__(f"line {self.line}, column {self.column}: {what}")


class UnfitText(InstallError):
    """A text is sound, but cannot be edited without a change of something else in it."""


class Style(NamedTuple):
    """How a text is laid out."""

    newline: str
    unit: str  # what a member is indented by, beyond its holder


def place_of(text: str, at: int) -> tuple[int, int]:
    """The line and the column of an offset, both counted from 1."""
    before = text[:at]
    line_start = max(before.rfind("\n"), before.rfind("\r")) + 1
    lines = before.replace("\r\n", "\n").replace("\r", "\n").count("\n")
    return lines + 1, at - line_start + 1


def newline_of(text: str) -> str:
    """The line ending that a text uses first; a line feed if it has one line."""
    at = text.find("\n")
    return "\r\n" if at > 0 and text[at - 1] == "\r" else "\n"


def line_start(text: str, at: int) -> int:
    """Where the line of an offset begins."""
    return text.rfind("\n", 0, at) + 1


def line_end(text: str, at: int) -> int:
    """Where the line after that of an offset begins, or the text ends."""
    found = text.find("\n", at)
    return len(text) if found < 0 else found + 1


def nested(path: Path, value: Any) -> Any:
    """The value under its keys: {a: {b: value}} for the path a, b."""
    for key in reversed(path):
        value = {key: value}
    return value


def value_at(data: Any, path: Path) -> Any:
    """The value to which keys lead, or None if there is none."""
    for key in path:
        if not isinstance(data, Mapping) or key not in data:
            return None
        data = data[key]
    return data


def with_value(data: Any, path: Path, value: Any) -> Any:
    """A copy of the data with this value at the path; what is null on the way becomes an object.

    Raises:
        UnfitText: something on the way is a value that holds no others.
    """
    if not path:
        return value
    if data is not None and not isinstance(data, Mapping):
        raise UnfitText(f"what should hold {path[0]!r} is {str(data)[:40]!r}")
    held = data or {}
    return {**held, path[0]: with_value(held.get(path[0]), path[1:], value)}


def without_value(data: Any, path: Path) -> Any:
    """A copy of the data without what is at the path; what holds it stays, even if nothing is left in it."""
    if len(path) == 1:
        return {key: value for key, value in data.items() if key != path[0]}
    return {**data, path[0]: without_value(data[path[0]], path[1:])}


def rest_of(data: Any, path: Path) -> Any:
    """A copy of the data without what is at the path, and without its holders where nothing else is in them."""
    if not isinstance(data, Mapping) or path[0] not in data:
        return data
    rest = {key: value for key, value in data.items() if key != path[0]}
    if len(path) == 1:
        return rest
    inner = rest_of(data[path[0]], path[1:])
    return {**rest, path[0]: inner} if inner else rest


def same(one: Any, other: Any) -> bool:
    """Whether two parsed values say the same, whatever the order of their keys; a number that is none equals itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))
