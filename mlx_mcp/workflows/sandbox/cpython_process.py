"""One CPython process: how it starts, how it is asked, how it ends.

Its pipes are read and written on a thread of the process's own, one exchange at a time. The process ends with an
exchange that fails, takes too long or is cancelled, and at `end`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox.frames import Malformed, read_message
from mlx_mcp.workflows.sandbox.isolation import Enclosed
from mlx_mcp.workflows.sandbox.own_thread import OwnThread

T = TypeVar("T")
Exchange = Callable[[IO[bytes], IO[bytes]], T]  # writes to the first pipe, and reads from the second

START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 30.0
FAILED = (EOFError, OSError, Malformed)  # what an exchange raises with a process that has ended, or writes nonsense


@dataclass(frozen=True)
class Command:
    """What starts a child: the script, its arguments, and what the child is told by one more argument, as JSON."""

    enclosed: Enclosed
    arguments: tuple[str, ...]
    options: Mapping[str, Any]


class CPythonProcess:
    """A child within what is around it."""

    def __init__(self, command: Command) -> None:
        """Nothing is started yet."""
        self._command = command
        self._thread = OwnThread()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    async def start(self) -> None:
        """Start the process, and wait until it takes requests.

        Raises:
            SandboxFailed: it does not start.
        """
        try:
            await self._within(START_TIMEOUT_S, self._start)
        except (*FAILED, TimeoutError) as exc:
            await self.end()
            raise SandboxFailed(
                f"The sandbox's interpreter does not start ({type(exc).__name__}). Try again; `mlx-mcp doctor` "
                "says what is wrong if it goes on."
            ) from exc

    def _start(self) -> None:
        command = self._command
        self._process = subprocess.Popen(
            [command.enclosed.ready(), *command.arguments, json.dumps(command.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # a group of its own, which is killed as a whole
        )
        if self._ended:
            self._kill()
        assert self._process.stdout is not None
        if read_message(self._process.stdout).get("kind") != "ready":
            raise Malformed("it does not say that it is ready")

    async def do(self, exchange: Exchange[T], timeout_s: float) -> T:
        """Have requests written and answers read.

        Raises:
            TimeoutError: it took longer than `timeout_s`. The process has been ended.
            EOFError, OSError, Malformed: the process has ended, or wrote nonsense.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        return await self._within(timeout_s, lambda: exchange(stdin, stdout))

    async def _within(self, timeout_s: float, call: Callable[[], T]) -> T:
        """A call on the thread; after the timeout, or cancelled, what the process does is unknown, and it is ended."""
        if self._ended:
            raise EOFError
        try:
            return await asyncio.wait_for(self._thread.call(call), timeout_s)
        except (TimeoutError, asyncio.CancelledError):
            await self.end()
            raise

    async def end(self) -> None:
        """End the process and all that is around it, whatever it does. Whoever waits for it gets EOFError."""
        if not self._ended:  # afterwards its id may be another's
            self._ended = True
            self._kill()
        await self._thread.end(self._stop, END_TIMEOUT_S)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        for pipe in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(OSError):
                pipe.close()
        process.wait()
