"""The thread of one interpreter process: who waits for that process does so there, one call after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class OwnThread:
    """Makes blocking calls. It starts with the first one, and ends after the last."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
        self._latest: asyncio.Future[Any] | None = None
        self._ending = False

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """What the function returns or raises. If the caller is cancelled, the call goes on: `end` waits for it.

        Raises:
            RuntimeError: the thread has ended, or is about to.
        """
        return asyncio.shield(self._queued(function))

    def _queued(self, function: Callable[[], T]) -> asyncio.Future[T]:
        future = asyncio.get_running_loop().run_in_executor(self._executor, function)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # of which nobody may hear
        self._latest = future
        return future

    async def end(self, last: Callable[[], None], timeout_s: float) -> None:
        """Make a last call after those that wait, unless there was one, and wait until all are done or time is up."""
        if not self._ending:
            self._ending = True
            self._queued(last)
            self._executor.shutdown(wait=False)
        if self._latest is not None:
            await asyncio.wait([self._latest], timeout=timeout_s)
