"""Runs a sandbox's programs in pydantic-monty, an interpreter of Python that is a process of its own.

This finds the interpreter and what can be put around it. What goes on in one of its processes is in `monty_worker.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox.isolation import Enclosed, Interpreter, enclose
from mlx_mcp.workflows.sandbox.monty_worker import MontyWorker
from mlx_mcp.workflows.sandbox.runtime import Limits, Worker

DUMP_FORMAT = 1  # of what this package puts into a dump, beside the interpreter's own
REINSTALL = "Reinstall it: pip install --force-reinstall 'pydantic-monty>=1.4,<2'."


async def open_runtime(folder: Path) -> MontyRuntime:
    """Find the interpreter, and try out what can be put around it.

    A script that starts it is written to `folder`, which must belong to the user alone, and stays there.

    Raises:
        SandboxFailed: it is not installed, or does not run here.
    """
    try:
        import pydantic_monty
        from pydantic_monty._binary import find_monty_binary

        path = Path(find_monty_binary())
    except (ImportError, FileNotFoundError) as exc:
        raise SandboxFailed(
            "Sandboxes need the package pydantic-monty, which is not installed whole. Run: "
            "pip install --force-reinstall 'pydantic-monty>=1.4,<2', and start the server again."
        ) from exc
    enclosed = await asyncio.to_thread(enclose, Interpreter(path, b"monty", REINSTALL), folder)
    return MontyRuntime(enclosed, pydantic_monty.__version__)


class MontyRuntime:
    """Starts workers by one script, which encloses the interpreter. `open_runtime` makes it."""

    def __init__(self, enclosed: Enclosed, interpreter_version: str) -> None:
        """`enclosed` is what `enclose` found to work."""
        self.isolation = enclosed.isolation
        self.version = f"monty {interpreter_version}, {DUMP_FORMAT}"
        self._enclosed = enclosed
        self._workers: set[MontyWorker] = set()

    async def start(self, limits: Limits, functions: Collection[str]) -> Worker:
        """See `Runtime.start`."""
        worker = MontyWorker(self._enclosed, self.version, limits, functions, self._workers.discard)
        await worker.begin()
        self._workers.add(worker)
        return worker

    async def close(self) -> None:
        """See `Runtime.close`."""
        for worker in list(self._workers):
            await worker.close()
