"""Ends a serving process in bounded time: on the client's end of file, on a signal, and when something hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable

import anyio


async def until_signal(
    serve: Callable[[], Awaitable[None]], stop: Callable[[anyio.CancelScope], Awaitable[None]]
) -> None:
    """Run `serve` until it returns, or until SIGTERM or SIGINT, on which `stop` is awaited once.

    After the first signal the system's own handling is back: a second one ends the process at once.
    """
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    break
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            await stop(tasks.cancel_scope)

        tasks.start_soon(watch)
        await serve()
        tasks.cancel_scope.cancel()


def exit_within(timeout_s: float) -> None:
    """End the process after `timeout_s` even if a thread is stuck in a write that nobody reads."""

    def end() -> None:
        print(f"mlx-mcp: not ended within {timeout_s:g} s; exiting now", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
