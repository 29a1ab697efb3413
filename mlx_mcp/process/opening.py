"""What a host says before there is an engine: lines that wait for the first one, and the handshake, said to each anew.

Imported by the relay: standard library only, and little of that.
"""

from __future__ import annotations

import threading

from mlx_mcp.process.lines import Id, envelope
from mlx_mcp.process.link import Link

HANDSHAKE_S = 30.0


class Backlog:
    """The host's lines that wait for the first engine, in order. The holder of the lock for sending uses it."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.num_bytes = 0
        self.open = True  # whether the engine is still to come
        self.acknowledged: set[Id] = set()  # of the requests to listen: those whose sender has been told that they wait
        self.settled = threading.Event()  # there is an engine, or it is known why not

    def add(self, line: bytes) -> None:
        """Have a line wait."""
        self.lines.append(line)
        self.num_bytes += len(line)

    def cancel(self, id_: Id) -> None:
        """Drop a request that the host waits for no more."""
        self.lines = [line for line in self.lines if not (seen := envelope(line)).method or seen.id != id_]
        self.num_bytes = sum(map(len, self.lines))

    def take(self) -> list[bytes]:
        """Take all lines; from now on none waits."""
        self.open, lines, self.lines, self.num_bytes = False, self.lines, [], 0
        self.settled.set()
        return lines


class Handshake:
    """What the host has said to shake hands. It is repeated with each engine, since each has to hear it."""

    def __init__(self) -> None:
        self.initialize = self.initialized = b""
        self._id: Id | None = None

    def begin(self, line: bytes, id_: Id) -> None:
        """Note the host's `initialize`."""
        self.initialize, self._id, self.initialized = line, id_, b""

    def repeat(self, link: Link) -> None:
        """Shake hands with an engine, whose answer is not for the host."""
        link.own_handshake = self._id
        link.send(self.initialize)
        link.shaken_hands.wait(HANDSHAKE_S)
        if self.initialized:
            link.send(self.initialized)
