"""Reads kept states: one variable, in a worker of its own, so that no run is disturbed; and what the runs said."""

from __future__ import annotations

import asyncio
import keyword
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mlx_mcp.errors import InvalidRequest, StorageError
from mlx_mcp.workflows.sandbox.journal import Journal
from mlx_mcp.workflows.sandbox.keeping import Keeping
from mlx_mcp.workflows.sandbox.runtime import Ended, Limits, Runtime
from mlx_mcp.workflows.sandbox.sandbox import Sandbox, State, end, loaded


async def value_of(runtime: Runtime, state: State, variable: str) -> Any:
    """The value of a variable as JSON has it; a text of it where it is nothing that JSON has.

    Raises:
        InvalidRequest: there is no such variable.
        MlxMcpError: the state cannot be loaded.
    """
    missing = (
        f"There is no variable {variable[:80]!r} in this sandbox. Give one of: {', '.join(sorted(state.variables))}."
    )
    if not state.variables:
        missing = "This sandbox has no variables yet. Run a program in it first (sandbox_run)."
    if not state.dump or not variable.isidentifier() or keyword.iskeyword(variable):
        raise InvalidRequest(missing)
    worker, _ = await loaded(runtime, Limits(), state)
    try:
        ended = await worker.run(variable)
    finally:
        await end(worker)
    assert isinstance(ended, Ended), "a name calls nothing"
    if ended.error is not None and ended.error.type == "NameError":
        raise InvalidRequest(missing)
    if ended.error is not None:
        raise InvalidRequest(
            f"The variable {variable[:80]!r} cannot be read: {ended.error.message[:200]}. Have a program in the "
            "sandbox put a part of it into another variable, and read that."
        )
    return ended.value


async def run_in_them(keeping: Keeping, sandboxes: Sequence[Sandbox], text: str) -> list[Sandbox]:
    """Those of the sandboxes whose programs, or what these printed first, have a text, capitals or not.

    What cannot be read does not count.
    """
    wanted, found = text.casefold(), []
    for sandbox in sandboxes:
        with suppress(StorageError):
            journal = await keeping.journal_of(sandbox)
            if await asyncio.to_thread(says, journal, wanted):  # a journal may have megabytes of inputs
                found.append(sandbox)
    return found


def says(journal: Journal, wanted: str) -> bool:
    """Whether code or output has a text that is case-folded."""
    return any(wanted in said.casefold() for cell in journal.cells() for said in (cell.code, cell.output))
