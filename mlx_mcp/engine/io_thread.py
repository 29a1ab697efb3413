"""The thread that reads and writes for the engine.

Guarantees:
    - `submit` never blocks. One piece of work runs at a time: urgent pieces first, background ones last, else in order.
    - A background piece may take minutes. Between its parts it calls `run_others`, which runs all other pieces.
    - The result of a piece goes to the engine thread as a command. Nothing else of the engine is used here.
    - `close` runs all pieces that were submitted before, as far as the time allows.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from mlx_mcp.engine.results import ThreadResult
from mlx_mcp.errors import EngineDead, MlxMcpError, StorageError

logger = logging.getLogger(__name__)

NICE = 5  # of this thread and those that it starts: where cores are few, a step must not wait for a checksum
URGENT, USUAL, BACKGROUND, LAST = range(4)
T = TypeVar("T")


class Io(Protocol):
    """Does the work that may wait for a disk."""

    def submit(
        self,
        work: Callable[[], T],
        result: Callable[[T | MlxMcpError], ThreadResult],
        urgent: bool = False,
        background: bool = False,
    ) -> None:
        """Do the work elsewhere. Then call `result` with its outcome or error, and send the engine what it returns."""

    def run_others(self) -> None:
        """Run all waiting pieces that are not background. A background piece calls it between its parts."""

    def close(self, last: Callable[[], None], timeout_s: float) -> bool:
        """Run what was submitted, then `last`, and end; returns whether that was in time."""


class IoThread:
    """See Io. The thread starts with the first piece of work, and calls `at_end` last."""

    def __init__(self, post: Callable[[ThreadResult], None], at_end: Callable[[], None] = lambda: None) -> None:
        self._post, self._at_end = post, at_end
        self._queue: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(
        self,
        work: Callable[[], T],
        result: Callable[[T | MlxMcpError], ThreadResult],
        urgent: bool = False,
        background: bool = False,
    ) -> None:
        """See Io.submit."""

        def run() -> None:
            outcome: Any
            try:
                outcome = work()
            except MlxMcpError as error:
                outcome = error
            except Exception as error:  # whoever waits must hear of it, and the next piece must run
                logger.exception("reading or writing failed")
                outcome = StorageError(f"The store failed: {error!r}. Generations go on; restart the server.")
            with suppress(EngineDead):  # then nobody waits any more
                self._post(result(outcome))

        with self._lock:
            self._queue.put((URGENT if urgent else BACKGROUND if background else USUAL, next(self._count), run))
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="mlx-io", daemon=True)
                self._thread.start()

    def run_others(self) -> None:
        """See Io.run_others."""
        while True:
            try:
                piece = self._queue.get_nowait()
            except queue.Empty:
                return
            if piece[0] >= BACKGROUND:
                self._queue.put(piece)
                return
            piece[-1]()

    def close(self, last: Callable[[], None], timeout_s: float) -> bool:
        """See Io.close."""
        with self._lock:
            self._queue.put((LAST, next(self._count), last))
            self._queue.put((LAST, next(self._count), _end))
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="mlx-io", daemon=True)
                self._thread.start()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        if sys.platform == "linux":  # elsewhere it would be the whole process's
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, 0, NICE)
        while True:
            _, _, run = self._queue.get()
            if run is _end:
                self._at_end()
                return
            run()


def _end() -> None:
    """The piece with which the thread ends."""
