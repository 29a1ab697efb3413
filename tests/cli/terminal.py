"""Commands in a terminal of their own, as wide as a test wants it."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from typing import Any, Self

WAIT_S = 90


class Terminal:
    """A command that takes the other end of a pseudo-terminal for its user."""

    def __init__(self, *arguments: str, columns: int = 72, **env: str) -> None:
        self.text = ""
        self.pid, self.fd = pty.fork()
        if not self.pid:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            # Not what readline has put into this process's environment behind Python's back: a size of its own.
            env = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"} | env
            os.execve(sys.executable, [sys.executable, "-m", "mlx_mcp", *arguments], env)

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def until(self, words: str | None) -> Self:
        """Read until these words were printed, or everything if they never are."""
        deadline = time.monotonic() + WAIT_S
        while words is None or words not in self.text:
            assert time.monotonic() < deadline, self.text
            if not select.select([self.fd], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # the command has ended
                data = b""
            if not data:
                assert words is None, f"{words!r} is not in {self.text!r}"
                return self
            self.text += data.decode()
        return self

    def end(self) -> int:
        """Read to the end; returns the exit status."""
        self.until(None)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    @property
    def lines(self) -> list[str]:
        """What the terminal shows, without what only moves the cursor or colours."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)
        return [line.split("\r")[-1] for line in plain.replace("\r\n", "\n").split("\n")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


def shown(*arguments: str, **options: Any) -> tuple[list[str], int]:
    """The lines that a command shows in a terminal, and its exit status."""
    with Terminal(*arguments, **options) as terminal:
        status = terminal.end()
        return terminal.lines, status
