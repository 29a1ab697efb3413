"""Ends a serving process in bounded time: on the client's end of file, on a signal, and when something hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable

import anyio

LAST_ANSWERS_S = 2.0  # for the error answers of cancelled calls to reach the wire
POLL_S = 0.02


async def run_until_signal(
    serve: Callable[[], Awaitable[None]], stop: Callable[[anyio.CancelScope], Awaitable[None]]
) -> None:
    """Run `serve` until it returns, or until SIGTERM or SIGINT, on which `stop` is awaited once.

    After the first signal the system's own handler is installed again: a second signal ends the process at once.
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


async def drain(is_busy: Callable[[], bool], cut_offs: Iterable[Callable[[], None]], timeout_s: float) -> None:
    """Wait until `is_busy` returns False. Calls that still run after `timeout_s` are ended by `cut_offs`."""
    for limit_s in (timeout_s, LAST_ANSWERS_S):
        with anyio.move_on_after(limit_s):
            while is_busy():  # noqa: ASYNC110  # the end of calls has no event
                await anyio.sleep(POLL_S)
        for cut_off in cut_offs:
            cut_off()


def exit_within(timeout_s: float) -> None:
    """Exit the process after `timeout_s`, even if a thread hangs in a write that nobody reads."""

    def end() -> None:
        print(f"mlx-mcp: not ended within {timeout_s:g} s; exiting now", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
