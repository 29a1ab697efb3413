"""What every command says beside its output: notes, and errors in one line; and with what it then exits.

0 done    1 there is nothing of the kind    2 a mistake or a failure, told on stderr    130 Ctrl-C
141 nobody read on, as in `| head`
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import ParamSpec

import typer

from mlx_mcp.errors import MlxMcpError

P = ParamSpec("P")
NOTHING, FAILED, INTERRUPTED, UNREAD = 1, 2, 130, 141

# Most errors are written for a model that calls tools; at a terminal there are commands and options instead.
_TOOL_WORDS = [
    (re.compile(pattern), words)
    for pattern, words in (
        (r"Call list_models for valid names; now:", "`mlx-mcp models` lists those there are; now:"),
        (r"\(list_models shows each\)", "(`mlx-mcp models` shows each)"),
        (r"Say in `prompt` what the model should do\.", 'Say what the model should do: mlx-mcp run "…".'),
        (r"\bgive what matters in it in `prompt`", "give what matters in it in the prompt"),
        (r"\bgive the part that matters in `prompt`", "give the part that matters in the prompt"),
    )
]


def note(text: str) -> None:
    """Tell the user something beside the output."""
    say(f"mlx-mcp: {text}")


def say(line: str) -> None:
    """Show a line beside the output."""
    typer.echo(line, err=True)


def at_a_terminal(error: MlxMcpError) -> str:
    """An error's text, with commands and options where it speaks of tools and their arguments."""
    text = str(error)
    for pattern, words in _TOOL_WORDS:
        text = pattern.sub(words, text)
    return text


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Show this package's errors as one line, and exit as it is said above."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except MlxMcpError as error:
            note(at_a_terminal(error))
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            # What is left in the buffer would raise again when the interpreter flushes it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(UNREAD) from error

    return run


def never_fail_to_print() -> None:
    """Have characters that the terminal does not have printed as escapes, and nothing at all where stdout is closed."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # stays open as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # somebody put another one in its place
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # see the line before
