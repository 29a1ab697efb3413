"""Reads one variable of a kept state, in a worker of its own, so that a run that goes on is not disturbed."""

from __future__ import annotations

import keyword
from typing import Any

from mlx_mcp.errors import InvalidRequest
from mlx_mcp.workflows.sandbox.runtime import Ended, Limits, Runtime
from mlx_mcp.workflows.sandbox.sandbox import State, end, loaded


async def value_of(runtime: Runtime, state: State, variable: str) -> Any:
    """The value of a variable as JSON has it; a text of it where it is nothing that JSON has.

    Raises:
        InvalidRequest: there is no such variable.
        MlxMcpError: the state cannot be loaded.
    """
    if not variable.isidentifier() or keyword.iskeyword(variable) or variable not in state.variables:
        known = ", ".join(sorted(state.variables)) or "none"
        raise InvalidRequest(f"There is no variable {variable[:80]!r} in this sandbox; there are: {known}.")
    worker, _ = await loaded(runtime, Limits(), state)
    try:
        ended = await worker.run(variable)
    finally:
        await end(worker)
    if not isinstance(ended, Ended) or ended.error is not None:
        why = ended.error.message if isinstance(ended, Ended) and ended.error is not None else "it calls a function"
        raise InvalidRequest(f"The variable {variable[:80]!r} cannot be read: {why[:200]}. Read a part of it.")
    return ended.value
