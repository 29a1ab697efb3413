"""Opens what runs programs: the interpreter that the settings name, and never another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mlx_mcp.workflows.sandbox.runtime import Runtime

Python = Literal["monty", "cpython"]


async def open_runtime(folder: Path, python: Python = "monty") -> Runtime:
    """What runs programs here; what starts its processes is kept in a folder that is the user's alone.

    Raises:
        SandboxFailed: it cannot run here; the text says what to install or to set.
    """
    # Imported for the first program: they look at the system.
    if python == "cpython":
        from mlx_mcp.workflows.sandbox import cpython

        return await cpython.open_runtime(folder)
    from mlx_mcp.workflows.sandbox import monty

    return await monty.open_runtime(folder)
