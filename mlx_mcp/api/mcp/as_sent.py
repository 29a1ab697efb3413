"""Takes arguments as clients send them, which their models write: null for nothing, numbers and objects as texts."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationInfo, field_validator, model_validator

INTEGER = re.compile(r"[+-]?[0-9]+(\.0*)?")


class AsSent(BaseModel):
    """A model whose values may come in other forms that can mean one thing only; its JSON schema says nothing of that.

    Null stands for an argument that is left out. An integer may be "8" or 8.0; a list or an object may be the JSON text
    of one. A truth value is never a number.
    """

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        """The arguments without those that are null, unless nobody knows them; of a JSON text, its object's."""
        given = from_json(given, (dict,))
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}

    @field_validator("*", mode="before")
    @classmethod
    def as_declared(cls, given: Any, info: ValidationInfo) -> Any:
        """A value in the form that its field declares, where it can be that."""
        assert info.field_name is not None, "it validates fields"
        return as_type(given, cls.model_fields[info.field_name].annotation)


def as_type(given: Any, declared: Any) -> Any:
    """A value as what is declared for it, where it means that; else as it is, to be refused in pydantic's words.

    Raises:
        ValueError: it is a truth value in place of a number, which pydantic takes for 0 or 1.
    """
    kind = without_null(declared)
    origin = get_origin(kind) or kind
    if origin is list:
        given = from_json(given, (list,))
        (inner,) = get_args(kind) or (Any,)
        return [as_type(each, inner) for each in given] if isinstance(given, list) else given
    if origin is dict:
        return from_json(given, (dict,))
    if kind in (int, float) and isinstance(given, bool):
        raise ValueError(f"Input should be a number, not {str(given).lower()}")
    if kind is int and isinstance(given, str | float):
        with suppress(ValueError, OverflowError):  # it is no integer
            return as_integer(given)
    return given


def without_null(declared: Any) -> Any:
    """What a type is when it is not None; of several such types none is better than another."""
    if get_origin(declared) not in (Union, UnionType):
        return declared
    kinds = [kind for kind in get_args(declared) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else Any


def as_integer(given: str | float) -> int:
    """The integer that a text or a number is.

    Raises:
        ValueError or OverflowError: it is none.
    """
    if isinstance(given, str):
        if not INTEGER.fullmatch(given):
            raise ValueError("it is no integer")
        return int(given.partition(".")[0])
    if given != int(given):
        raise ValueError("it has a fraction")
    return int(given)


def from_json(given: Any, kinds: tuple[type, ...]) -> Any:
    """What a JSON text stands for, if it is of these kinds; else the value as it is."""
    if isinstance(given, str):
        with suppress(ValueError, RecursionError):
            read = json.loads(given)
            if isinstance(read, kinds):
                return read
    return given
