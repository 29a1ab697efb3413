"""The arguments that tools have of the table of sampling parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase
from pydantic import ConfigDict, Field, create_model

from mlx_mcp.service.values import PARAMETERS, Parameter, Sampling

A = TypeVar("A", bound="Arguments")
# The types and defaults of arguments for what the table has as tuples.
AS_ARGUMENTS: dict[Any, tuple[Any, Any]] = {
    tuple[str, ...]: (list[str] | None, None),
    tuple[tuple[int, float], ...]: (dict[int, float] | None, None),
}


class Arguments(ArgModelBase):
    """A tool's arguments, none by default. A tool gets them whole, so that tools can share some by inheritance."""

    model_config = ConfigDict(extra="forbid")

    def model_dump_one_level(self) -> dict[str, Any]:
        """What the SDK calls the tool with."""
        return {"given": self}


def drawn(but: tuple[str, ...] = ()) -> Callable[[type[A]], type[A]]:
    """Give a tool's arguments those of the table of sampling parameters, `but` these."""

    def give(arguments: type[A]) -> type[A]:
        made: dict[str, Any] = {name: argument(each) for name, each in PARAMETERS.items() if name not in but}
        return create_model(arguments.__name__, __base__=arguments, __module__=__name__, **made)

    return give


def argument(parameter: Parameter) -> tuple[Any, Any]:
    """A sampling parameter as an argument: its type and its default."""
    type_, default = AS_ARGUMENTS.get(parameter.type, (parameter.type, parameter.default))
    said: dict[str, Any] = {bound: value for bound, value in vars(parameter.asked).items() if value is not None}
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


def sampling_of(given: Arguments) -> Sampling:
    """How arguments have an answer drawn."""
    values = {name: getattr(given, name) for name in PARAMETERS if getattr(given, name, None) is not None}
    return Sampling(**{name: as_tuple(value) for name, value in values.items()})
