"""Options that several commands have, and those that are made of the table of sampling parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from mlx_mcp.cli.completion import model_names
from mlx_mcp.core.sampling import PARAMETERS, Parameter, Sampling

C = TypeVar("C", bound=Callable[..., None])

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="`embedded`, a folder, or a hub id. The embedded model if nothing is set.",
        autocompletion=model_names,
    ),
]
OpenBlas = Annotated[
    bool | None,
    typer.Option("--openblas/--no-openblas", help="Use an installed OpenBLAS on Linux CPUs (default: yes)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def sampling_flags(after: str) -> Callable[[C], C]:
    """Give a command the flags of the sampling parameters, after another one of its own; it gets them as keywords."""

    def give(command: C) -> C:
        signature = inspect.signature(command, eval_str=True)
        own = [
            each.replace(kind=each.KEYWORD_ONLY)
            for each in signature.parameters.values()
            if each.kind != each.VAR_KEYWORD
        ]
        at = 1 + [each.name for each in own].index(after)
        flags = [sampling_flag(name, parameter) for name, parameter in PARAMETERS.items() if parameter.flag]
        vars(command)["__signature__"] = signature.replace(parameters=[*own[:at], *flags, *own[at:]])
        return command

    return give


def sampling_flag(name: str, parameter: Parameter) -> inspect.Parameter:
    """A command's parameter that is a flag; one that takes texts may be given again."""
    type_, default = parameter.type, parameter.default
    if type_ == tuple[str, ...]:
        type_, default = list[str] | None, None
    annotated: Any = Annotated  # of a type that is known when this runs
    annotation = annotated[type_, typer.Option(help=parameter.flag)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def sampling_of(flags: dict[str, Any]) -> Sampling:
    """The parameters that flags stand for."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    return Sampling(**{name: value for name, value in values.items() if value is not None})
