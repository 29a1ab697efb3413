"""What the author of a program is told of the exception that ended it: the type, the line, and what to write instead."""

from __future__ import annotations

import re

from mlx_mcp.workflows.sandbox.runtime import ProgramError


def explain(type_name: str, message: str, line: int | None, code: str) -> ProgramError:
    """The exception with a hint. `line` counts from 1 in `code`, as it was sent."""
    return ProgramError(type_name, message, line, "")
