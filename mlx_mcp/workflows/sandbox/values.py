"""What may leave a sandbox: values as JSON has them, bounded in number and depth. Everything else becomes a text."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Mapping
from datetime import date, time
from typing import Any

MAX_VALUES = 200_000  # in one value that crosses: some 20 MB of Python objects
MAX_DEPTH = 64
MAX_INT_BITS = 14_000  # Python itself prints no longer integer


class TooLarge(ValueError):
    """A value has more parts, or lies deeper, than may leave a sandbox."""


def plain(value: Any) -> Any:
    """The value in None, bool, int, float, str, list, dict and tuple.

    Sets become lists, dates their ISO form, bytes text, objects dicts of their attributes, all else its text.

    Raises:
        TooLarge: it has more than `MAX_VALUES` parts, or lies more than `MAX_DEPTH` deep.
    """
    return _Reader().read(value, 0)


def sendable(value: Any, depth: int = 0) -> Any:
    """The same value as the interpreter takes it: no half characters, and texts of what JSON does not have."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth < MAX_DEPTH:
        if isinstance(value, Mapping):
            return {sendable(key, depth + 1): sendable(each, depth + 1) for key, each in value.items()}
        if isinstance(value, list | tuple):
            each = [sendable(each, depth + 1) for each in value]
            return each if isinstance(value, list) else tuple(each)
    return "…" if isinstance(value, Mapping | list | tuple) else str(value)[:10_000]


@dataclasses.dataclass
class _Reader:
    """Reads one value, and counts its parts. A part that is in it twice counts twice: as JSON it is there twice."""

    num_values: int = 0

    def read(self, value: Any, depth: int) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise TooLarge(
                f"the value has more than {MAX_VALUES} parts, or lies more than {MAX_DEPTH} deep. Use a part of it, or "
                "join it into a text"
            )
        if value is None or isinstance(value, bool | float | str):
            return value
        if isinstance(value, int):
            return value if value.bit_length() <= MAX_INT_BITS else f"an integer of {value.bit_length()} bits"
        if isinstance(value, Mapping):
            return {self._key(key): self.read(each, depth + 1) for key, each in value.items()}
        if isinstance(value, list | set | frozenset):
            return self._all(value, depth)
        if isinstance(value, tuple):
            names = getattr(value, "_fields", None)
            each = self._all(value, depth)
            return dict(zip(names, each, strict=True)) if names else tuple(each)
        attributes = getattr(value, "attributes", None)  # of an object of a class that the program has defined
        if isinstance(attributes, Mapping):
            return self.read(dict(attributes), depth + 1) if attributes else str(getattr(value, "name", "object"))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [each.name for each in dataclasses.fields(value)]
            return self.read({name: getattr(value, name, None) for name in names}, depth + 1)
        if not isinstance(value, type) and callable(listed := getattr(value, "tolist", None)):
            return self.read(listed(), depth)  # of an array or a number of numpy, a series of pandas
        return _text(value)

    def _all(self, values: Iterable[Any], depth: int) -> list[Any]:
        return [self.read(each, depth + 1) for each in values]

    def _key(self, key: Any) -> Any:
        self.num_values += 1
        if isinstance(key, int) and key.bit_length() > MAX_INT_BITS:
            return f"an integer of {key.bit_length()} bits"
        if key is None or isinstance(key, bool | int | float | str):
            return key
        if isinstance(key, tuple):
            return str(self.read(key, MAX_DEPTH - 8))
        return _text(key)


def _text(value: Any) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    name = getattr(value, "name", None)
    if isinstance(name, str) and type(value).__module__.startswith("pydantic_monty"):
        return f"<{name}>"
    return repr(value) if isinstance(value, BaseException) else str(value)
