"""Kills an install or uninstall at each of its system calls, in a child process, and looks at what is left.

A program of its own, since it forks: `python -m tests.install.kills HOST ACTION STATE_FOLDER`. Prints how many calls
there are.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_mcp.install.hosts import hosts_named
from mlx_mcp.install.record import Record
from mlx_mcp.install.registration import Registration
from mlx_mcp.install.server import Server

CALLS = "open fsync replace unlink rmdir mkdir fchmod stat".split()
SERVER = Server("/opt/mlx/bin/mlx-mcp", ("serve",))


def killed_at(point: int, work: Callable[[], None]) -> bool:
    """Do the work in a child that is killed before its call of that number; whether it was."""
    child = os.fork()
    if not child:
        left = [point]

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        work()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def main(host_name: str, action: str, state: str) -> None:
    """Kill at one point after the other until the work is done before it."""
    (host,) = hosts_named([host_name])
    entry, file = host.entry("mlx", SERVER), host.file(None)

    def registration() -> Registration:
        return Registration(host, "mlx", Record(Path(state)))

    def data() -> bytes | None:
        return file.read_bytes() if file.exists() else None

    def install() -> None:
        registration().apply(registration().install(entry))

    def uninstall() -> None:
        registration().apply(registration().uninstall())

    before, seen, point, killed = data(), set[bytes | None](), 0, True
    files = sorted(Path.home().rglob("*"))
    while killed:
        point += 1
        if action == "uninstall":
            install()
        killed = killed_at(point, install if action == "install" else uninstall)
        seen.add(data())
        assert data() == before or registration().current() == entry
        install()
        assert registration().current() == entry
        uninstall()
        assert data() == before
        assert sorted(Path.home().rglob("*")) == files
        assert registration().record.edits() == []
    assert len(seen) == 2
    print(point)


if __name__ == "__main__":
    main(*sys.argv[1:])
