"""What every command says beside its output: notes, and errors in one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer

from mlx_mcp.errors import MlxMcpError

P = ParamSpec("P")


def note(text: str) -> None:
    """Tell the user something beside the output."""
    typer.echo(f"mlx-mcp: {text}", err=True)


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Show this package's errors as one line and exit with 2."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except MlxMcpError as error:
            typer.echo(f"mlx-mcp: {error}", err=True)
            raise typer.Exit(2) from error

    return run
