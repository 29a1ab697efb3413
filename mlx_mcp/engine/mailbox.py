"""Where one waiter on one event loop hears of its call, and sees whether the engine lives."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from types import TracebackType

from mlx_mcp.engine.messages import Event, Failed
from mlx_mcp.engine.requests import Progress
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import EngineDead

CHECK_S = 1.0  # how often a waiter looks whether the engine lives
KEEPALIVE_S = 5.0  # hosts cut a call that shows no life; repeat the latest progress this often
SLOW = "; the engine's current step has taken "


class Mailbox:
    """The events of one call, from `with` on."""

    def __init__(self, thread: EngineThread, call_id: int) -> None:
        self.call_id = call_id
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()

    def __enter__(self) -> Mailbox:
        """Listen to the call, which is to be sent after this."""
        self._thread.listen(self.call_id, self._queue.put_nowait, self._loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Listen no more."""
        self._thread.unlisten(self.call_id)

    def wake(self) -> None:
        """Have the waiter look at what it wants; it gets None in place of an event. On the waiter's event loop."""
        self._queue.put_nowait(None)

    async def next(self) -> Event | None:
        """The next event; None if it is time to show the caller a sign of life before it comes.

        Raises:
            MlxMcpError: the event was a failure.
            EngineDead: the thread died without a word.
        """
        return await self.get(KEEPALIVE_S)

    async def get(self, timeout_s: float = math.inf) -> Event | None:
        """The next event; None after `timeout_s` without one.

        Raises:
            MlxMcpError: the event was a failure.
            EngineDead: the thread died without a word.
        """
        deadline = self._loop.time() + timeout_s
        while True:
            wait_s = min(CHECK_S, deadline - self._loop.time())
            try:
                async with asyncio.timeout(wait_s):
                    event = await self._queue.get()
            except TimeoutError:
                check_alive(self._thread)
                if wait_s < CHECK_S:
                    return None
                continue
            if isinstance(event, Failed):
                raise event.error
            return event


def check_alive(thread: EngineThread) -> None:
    """See that the engine can still answer.

    Raises:
        EngineDead: it cannot.
    """
    if thread.dead is not None:
        raise EngineDead(thread.dead.cause)


def repeated(thread: EngineThread, progress: Progress) -> Progress:
    """The same progress once more, with word of a step that takes long."""
    line, step_s = progress.message.partition(SLOW)[0], thread.step_s
    return replace(progress, message=f"{line}{SLOW}{step_s:.0f} s" if step_s > KEEPALIVE_S else line)
