"""A runtime of this test run, workers in it, and programs run to their end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox.cpython_worker import CPythonWorker
from mlx_mcp.workflows.sandbox.monty_worker import MontyWorker
from mlx_mcp.workflows.sandbox.opening import Python, open_runtime
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits, Runtime, Worker
from tests.workflows.sandbox.snippets import FUNCTIONS, answer

LIMITS = Limits()
MOMENT = 1_767_225_600.0  # 2026-01-01


@cache
def runtime(python: Python = "monty") -> Runtime:
    """One for all tests of a process; it is bound to no loop."""
    folder = Path(os.environ["MLX_MCP_STATE_DIR"]) / "sandbox"
    with ThreadPoolExecutor() as pool:  # where it is asked for, a loop may run
        return pool.submit(asyncio.run, open_runtime(folder, python)).result()


@cache
def encloses_cpython() -> bool:
    """Whether something can be put around CPython here."""
    try:
        return bool(runtime("cpython").isolation)
    except SandboxFailed as error:
        if "only where the system encloses them" not in str(error):
            raise
        return False


def pid_of(worker: Worker) -> int:
    """The process of a worker."""
    if isinstance(worker, MontyWorker):
        assert worker._process is not None
        assert worker._process._pid is not None
        return worker._process._pid
    assert isinstance(worker, CPythonWorker)
    assert worker._process is not None
    assert worker._process._process is not None
    return worker._process._process.pid


@asynccontextmanager
async def started(
    limits: Limits = LIMITS, functions: tuple[str, ...] = FUNCTIONS, python: Python = "monty"
) -> AsyncIterator[Worker]:
    worker = await runtime(python).start(limits, functions)
    try:
        yield worker
    finally:
        await worker.close()


async def run(
    worker: Worker,
    code: str,
    inputs: Mapping[str, Any] = {},
    answer: Callable[[str, tuple[Any, ...], dict[str, Any]], Any] = answer,
    called: list[HostCall] | None = None,
) -> Ended:
    """A program to its end, with its host calls answered."""
    step = await worker.run(code, inputs, MOMENT)
    while isinstance(step, HostCall):
        if called is not None:
            called.append(step)
        try:
            step = await worker.answer(answer(step.name, step.args, step.kwargs))
        except SystemExit:
            step = await worker.refuse("SystemExit", "")
    return step


async def value_of(code: str, inputs: Mapping[str, Any] = {}) -> Any:
    """What a program gives, in a worker of its own."""
    async with started() as worker:
        ended = await run(worker, code, inputs)
        assert ended.error is None, ended.error
        return ended.value
