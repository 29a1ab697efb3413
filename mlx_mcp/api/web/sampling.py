"""What a shape that asks for an answer has of the table of sampling parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, create_model

from mlx_mcp.service.values import PARAMETERS, Parameter, Sampling

A = TypeVar("A", bound=BaseModel)
# The types and defaults of fields for what the table has as tuples. Keys of JSON are texts.
AS_FIELDS: dict[Any, tuple[Any, Any]] = {
    tuple[str, ...]: (list[str] | None, None),
    tuple[tuple[int, float], ...]: (dict[Annotated[int, Field(strict=False)], float] | None, None),
}


def nothing_more(name: str) -> dict[str, Any]:
    """Says nothing more of a parameter than the table does."""
    return {}


def with_sampling(
    without: tuple[str, ...] = (), more: Callable[[str], dict[str, Any]] = nothing_more
) -> Callable[[type[A]], type[A]]:
    """Give a shape the fields of the table of sampling parameters, `without` some; `more` says more of each."""

    def give(shape: type[A]) -> type[A]:
        made: dict[str, Any] = {
            name: sampling_field(each, more(name)) for name, each in PARAMETERS.items() if name not in without
        }
        return create_model(shape.__name__, __base__=shape, __module__=shape.__module__, __doc__=shape.__doc__, **made)

    return give


def sampling_field(parameter: Parameter, more: dict[str, Any]) -> tuple[Any, Any]:
    """A sampling parameter as a field: its type and its default."""
    type_, default = AS_FIELDS.get(parameter.type, (parameter.type, parameter.default))
    said = more | {bound: value for bound, value in vars(parameter.asked).items() if value is not None}
    if type_ in (int, int | None):
        said["strict"] = True
    return Annotated[type_, Field(description=parameter.about, **said)], default


def sampling_of(given: BaseModel) -> Sampling:
    """How a shape with these fields has an answer drawn."""
    values = {name: getattr(given, name) for name in PARAMETERS if getattr(given, name, None) is not None}
    return Sampling(**{name: as_tuple(value) for name, value in values.items()})


def as_tuple(given: Any) -> Any:
    """A value as the table has it."""
    match given:
        case dict():
            return tuple(given.items())
        case list():
            return tuple(given)
    return given
