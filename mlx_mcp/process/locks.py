"""The two locks of a place: one for the process that starts an engine, and one for the engine as long as it lives.

The operating system takes a lock back when its process has ended, however it ends. Imported by the relay: standard
library only, and little of that.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from mlx_mcp.errors import EngineUnavailable
from mlx_mcp.process.place import Place

POLL_S = 0.02


@contextlib.contextmanager
def try_lock(path: str) -> Iterator[bool]:
    """Try to take a lock, which is held until the end of the `with` block; yields whether it was free."""
    fd = open_lock(path)
    try:
        yield lock_file(fd)
    finally:
        os.close(fd)


def open_lock(path: str) -> int:
    """Open a file to lock."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def lock_file(fd: int) -> bool:
    """Lock a file until it is closed; returns False if another process has locked it."""
    import fcntl  # not everywhere, and where it is not there are no Unix sockets either

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_life_lock(place: Place, timeout_s: float) -> None:
    """Become the only engine of a place for as long as this process lives. An engine that is ending is waited for.

    Raises:
        EngineUnavailable: another engine has the lock.
    """
    place.prepare()
    deadline = time.monotonic() + timeout_s
    fd = open_lock(place.life_lock)
    while not lock_file(fd):
        if time.monotonic() > deadline:
            os.close(fd)
            raise EngineUnavailable(
                f"Another engine holds {place.life_lock}. `mlx-mcp engine stop` ends it, with --force even if it hangs."
            )
        time.sleep(POLL_S)
    os.ftruncate(fd, 0)
    os.write(fd, str(os.getpid()).encode())  # for whoever has to kill us
    # Never closed: the system does that once the process's memory is free, and so nobody loads weights too early.


def life_lock_holder(place: Place) -> int | None:
    """The id of the process that holds the life lock, 0 if it is not known; None if no process holds it."""
    try:
        fd = os.open(place.life_lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        if lock_file(fd):
            return None
        written = file.read(32)
    return int(written) if written.isdigit() else place.listener_pid() or 0
