"""Ends a child process that takes too much memory, where the system has no limit for that. Standard library only.

Linux has RLIMIT_AS, which the child sets itself. macOS takes that call and refuses it, so `ps` is asked there, a few
times a second and only from FIRST_S on: most work has ended by then.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

FIRST_S = 0.2
EVERY_S = 0.25


def resident_bytes(pid: int) -> int:
    """What a process has in memory; 0 if there is none, or the system does not say it."""
    try:
        said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, timeout=5)
        return int(said.stdout.strip() or 0) << 10
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


class MemoryWatch:
    """Looks at one child now and then; `look` is to be called often, and asks the system seldom."""

    def __init__(
        self, pid: int, max_bytes: int, ask: Callable[[int], int] = resident_bytes, platform: str = sys.platform
    ) -> None:
        self._pid, self._max_bytes, self._ask = pid, max_bytes, ask
        self._next = time.monotonic() + FIRST_S if platform == "darwin" else float("inf")

    def look(self) -> bool:
        """Whether the child takes more than it may, so that it is to be ended."""
        if time.monotonic() < self._next:
            return False
        over = self._ask(self._pid) > self._max_bytes
        self._next = time.monotonic() + EVERY_S
        return over
