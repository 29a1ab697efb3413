"""Keeps a Mac awake while calls run, by macOS's own `caffeinate`; elsewhere nothing is done. Standard library only.

A Mac that goes to sleep stops every process within a step, and App Nap slows down what nobody sees. `caffeinate -i`
asserts that the system does not sleep by itself; the display may. With `-w` it ends with this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

IDLE_S = 30.0  # so long after the last call the machine may sleep again: calls of one host come close together
LOOK_S = 1.0
COMMAND = ("/usr/bin/caffeinate", "-i", "-w")


class KeepAwake:
    """At most one child, there while calls run and for IDLE_S after; used by one thread at a time."""

    def __init__(
        self, command: Sequence[str] = COMMAND, clock: Callable[[], float] = time.monotonic, pid: int | None = None
    ) -> None:
        self._command = [*command, str(os.getpid() if pid is None else pid)]
        self._clock, self._busy_at = clock, 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._broken = False

    @property
    def awake(self) -> bool:
        """Whether the machine is kept awake."""
        return self._child is not None and self._child.poll() is None

    def look(self, busy: bool) -> None:
        """Say whether calls run or wait now; to be called every LOOK_S."""
        if busy:
            self._busy_at = self._clock()
            if not self.awake and not self._broken:
                self._start()
        elif self._child is not None and self._clock() - self._busy_at >= IDLE_S:
            self.end()

    def end(self) -> None:
        """Let the machine sleep. Idempotent."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()

    def _start(self) -> None:
        self.end()
        try:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                close_fds=False,  # spawned, not forked; no descriptor is inherited
            )
        except OSError:
            self._broken = True  # without it the machine may sleep, which is no reason not to serve


def keeps_awake(wanted: bool | None, platform: str = sys.platform) -> bool:
    """Whether the machine is to be kept awake: on macOS, unless the user does not want it."""
    return platform == "darwin" and wanted is not False
