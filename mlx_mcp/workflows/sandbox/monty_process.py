"""One process of the interpreter: how it starts, how its library is called, how it ends.

The library is called on a thread of the process's own, one call at a time. Its coroutines are not used: a Python that
exits after them is aborted now and then, because threads of the library still hold its objects (exit status 134 in 10
of 60 runs of pydantic-monty 1.4.0; 0 of 80 without them).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox.isolation import Enclosed
from mlx_mcp.workflows.sandbox.own_thread import OwnThread
from mlx_mcp.workflows.sandbox.runtime import Limits

if TYPE_CHECKING:
    from pydantic_monty import Monty, MontySession

T = TypeVar("T")

# Beyond the time that a program may take. The interpreter looks at its clock between operations, so that one that takes
# long, such as a search by a hard regular expression, is ended by killing the process.
LIMIT_GRACE_S = 5.0
TURN_GRACE_S = 30.0  # for what crosses: inputs, dumps
# Each suspension is a call of the host, and those who answer them bound them.
MAX_SUSPENSIONS = 1_000_000_000
MAX_RECURSION = 500


class MontyProcess:
    """A process and the interpreter's session in it. It ends with a call that fails or is cancelled, and at `end`."""

    def __init__(self, enclosed: Enclosed, limits: Limits) -> None:
        """Nothing is started yet."""
        self._enclosed, self._limits = enclosed, limits
        self._thread = OwnThread()
        self._pool: Monty | None = None
        self._session: MontySession | None = None
        self._pid: int | None = None

    async def start(self) -> None:
        """Start the process.

        Raises:
            SandboxFailed: it does not start.
        """
        try:
            await self._thread.call(self._start)
        except BaseException as exc:
            await self.end()
            if isinstance(exc, foreign_errors()):
                raise SandboxFailed(
                    f"The sandbox's interpreter does not start ({type(exc).__name__}). Try again; `mlx-mcp doctor` "
                    "says what is wrong if it goes on."
                ) from exc
            raise

    def _start(self) -> None:
        import pydantic_monty

        seconds = self._limits.seconds
        self._pool = pydantic_monty.Monty(
            binary_path=self._enclosed.ready(),
            min_processes=0,
            max_processes=1,
            max_checkouts_per_worker=1,
            request_timeout=seconds + TURN_GRACE_S,
            feed_duration_limit_grace=LIMIT_GRACE_S,
        )
        self._pool.__enter__()
        self._session = self._pool.checkout(
            limits={
                "max_feed_duration_secs": seconds,
                "max_memory": self._limits.memory_bytes,
                "max_suspensions": MAX_SUSPENSIONS,
                "max_recursion_depth": MAX_RECURSION,
            },
            os_policy={"datetime": "call_host", "random_start": "call_host", "sleep": "zero"},
            assert_message_annotations=False,  # as in Python; values are not quoted
        )
        self._session.__enter__()
        self._pid = self._session.worker_pid

    async def do(self, call: Callable[[MontySession], T]) -> T:
        """Call the library. Where the caller is cancelled, what the interpreter was doing is unknown: it is ended."""
        session = self._session
        if session is None:
            raise RuntimeError("the process has ended")
        try:
            return await self._thread.call(lambda: call(session))
        except asyncio.CancelledError:
            await self.end()
            raise

    async def end(self) -> None:
        """End the process, whatever it does. Whoever waits for it gets an exception of `foreign_errors`."""
        pid, self._pid = self._pid, None
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self._thread.end(self._stop, TURN_GRACE_S)

    def _stop(self) -> None:
        session, pool = self._session, self._pool
        self._session = self._pool = None
        for each in (session, pool):
            if each is not None:
                with contextlib.suppress(*foreign_errors()):
                    each.__exit__(None, None, None)


def foreign_errors() -> tuple[type[Exception], ...]:
    """What the interpreter's library raises where its process is gone or what it was given makes no sense."""
    from pydantic_monty import MontyError

    return (MontyError, RuntimeError, OSError, ValueError, TypeError)
