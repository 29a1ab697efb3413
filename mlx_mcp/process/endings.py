"""How engine processes ended: what relays say of one that died, and how much memory the next one takes.

    engine.running   by the engine itself: {"pid", "share", "ended"}; removed when it ends as it should
    engine.ended     by the process that started it: {"pid", "status"}, once the system has said how it ended

An engine that finds the first file of one that has not ended as it should takes SMALLER of that one's share of memory:
on Metal, to run out of memory ends the process. Once it has served for PROVEN_S the next one takes all again. Only the
holder of the life lock writes the first file. Imported by the relay: standard library only, and little of that.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

from mlx_mcp.process.place import Place

SMALLER = 7 / 8
LEAST_SHARE = 0.5
PROVEN_S = 1800.0
WAIT_S = 0.3  # for the process that started an engine to hear how that ended
POLL_S = 0.02
MAX_LINE = 300  # characters of a line of the log


def begin(place: Place) -> float:
    """Note that this process is the engine; returns which share of the memory's ceiling it takes."""
    found = read(running(place))
    share = share_of(found)
    if found and not found.get("ended"):
        share = max(LEAST_SHARE, share * SMALLER)
    write(running(place), {"pid": os.getpid(), "share": share})
    return share


def prove(place: Place) -> None:
    """Note that this engine has served for long enough: the next one takes all memory again."""
    write(running(place), {"pid": os.getpid(), "share": 1.0})


def end(place: Place) -> None:
    """Note that the engine ends as it should, or that a user has killed it."""
    found = read(running(place))
    if share_of(found) < 1:
        write(running(place), found | {"ended": True})
        return
    with contextlib.suppress(OSError):
        os.unlink(running(place))


def told(place: Place) -> str:
    """That less memory is taken, and why; empty if all is."""
    share = share_of(read(running(place)))
    if share >= 1:
        return ""
    return (
        f"an engine process died, so {share:.0%} of the memory's ceiling are taken until one has served for "
        f"{PROVEN_S / 60:.0f} minutes; `mlx-mcp engine logs` shows its last words"
    )


def note_end(place: Place, pid: int, status: int) -> None:
    """Note how a process that this one has started ended; a signal is a negative status."""
    write(ended(place), {"pid": pid, "status": status})


def how_ended(place: Place, pid: object) -> str:
    """How an engine ended, and the last line of its log, in sentences; empty if it ended as it should.

    Waits for WAIT_S at most: who started it hears of its end no sooner than we do, or has gone.
    """
    if not isinstance(pid, int):
        return ""
    deadline = time.monotonic() + WAIT_S
    while (found := read(ended(place))).get("pid") != pid and time.monotonic() < deadline:
        time.sleep(POLL_S)
    status = found.get("status") if found.get("pid") == pid else None
    line = last_line(place)
    if status == 0 or (status is None and not line):
        return ""
    how = "" if not isinstance(status, int) else f" {words_of(status)}"
    return f"{how} Its log ends: {line}" if line else how


def words_of(status: int) -> str:
    """An exit status in a sentence."""
    if status >= 0:
        return f"It ended with status {status}."
    import signal

    with contextlib.suppress(ValueError):
        return f"It was ended by {signal.Signals(-status).name}."
    return f"It was ended by signal {-status}."


def last_line(place: Place) -> str:
    """The last line of the engine's log that says something."""
    try:
        with open(place.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:MAX_LINE] for line in reversed(lines) if line.strip()), "")


def running(place: Place) -> str:
    """The file of the engine itself."""
    return os.path.join(place.folder, "engine.running")


def ended(place: Place) -> str:
    """The file of the process that started it."""
    return os.path.join(place.folder, "engine.ended")


def share_of(found: dict[str, object]) -> float:
    """The share that a file names; all, if it names none."""
    share = found.get("share")
    return min(1.0, max(LEAST_SHARE, share)) if isinstance(share, int | float) else 1.0


def read(path: str) -> dict[str, object]:
    """What a file says; nothing if it is not there, or damaged."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(4096))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: str, found: dict[str, object]) -> None:
    """Replace a file whole. If that fails nothing is known of the end, which is no reason to serve less."""
    part = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            json.dump(found, file)
        os.replace(part, path)
