"""The arguments that tools have of the table of sampling parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, create_model

from mlx_mcp.service.values import PARAMETERS, Parameter, Sampling

A = TypeVar("A", bound=BaseModel)
# The types and defaults of arguments for what the table has as tuples.
AS_ARGUMENTS: dict[Any, tuple[Any, Any]] = {
    tuple[str, ...]: (list[str] | None, None),
    tuple[tuple[int, float], ...]: (dict[int, float] | None, None),
}

DAILY = ("max_tokens", "temperature")  # the others are options
OPTIONS = {
    "stop": "stop (texts)",
    "logit_bias": "logit_bias ({token id: bias})",
    "logprobs": "logprobs (how many a token)",
    "reasoning_budget": "reasoning_budget (tokens)",
}


def with_sampling(without: tuple[str, ...] = ()) -> Callable[[type[A]], type[A]]:
    """Give a tool's arguments those of the table of sampling parameters, `without` some."""

    def give(arguments: type[A]) -> type[A]:
        made: dict[str, Any] = {name: argument(name, each) for name, each in PARAMETERS.items() if name not in without}
        return create_model(arguments.__name__, __base__=arguments, __module__=__name__, **made)

    return give


def argument(name: str, parameter: Parameter) -> tuple[Any, Any]:
    """A sampling parameter as an argument: its type and its default."""
    type_, default = AS_ARGUMENTS.get(parameter.type, (parameter.type, parameter.default))
    said: dict[str, Any] = {} if name in DAILY else {"json_schema_extra": {"option": OPTIONS.get(name, name)}}
    said |= {bound: value for bound, value in vars(parameter.asked).items() if value is not None}
    if type_ in (int, int | None):
        said["strict"] = True
    return Annotated[type_, Field(description=parameter.about, **said)], default


def as_tuple(given: Any) -> Any:
    """An argument as the table has it."""
    match given:
        case dict():
            return tuple(given.items())
        case list():
            return tuple(given)
    return given


def sampling_of(given: BaseModel) -> Sampling:
    """How arguments have an answer drawn."""
    values = {name: getattr(given, name) for name in PARAMETERS if getattr(given, name, None) is not None}
    return Sampling(**{name: as_tuple(value) for name, value in values.items()})
