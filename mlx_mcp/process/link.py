"""A relay's connection to one engine process: which requests are open, and whether the engine shows life.

The lock guards the open requests. It is not held while data is sent to the engine. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Callable

from mlx_mcp.process.lines import ACKNOWLEDGED, ALIVE, ENDING, LISTENING, SUBSCRIPTION, Id, envelope

TICK_S = 1.0
MAX_TOKENS = 1024  # progress tokens whose latest value is remembered


class Unanswered:
    """A request of the host that the engine has not answered. `line` is None if it was too long to be kept."""

    __slots__ = ("line", "method", "number")

    def __init__(self, method: str, line: bytes | None, number: int) -> None:
        self.method, self.line, self.number = method, line, number

    @property
    def progress_token(self) -> Id | None:
        """The token under which its sender accepts progress; None if it accepts none."""
        try:
            token = json.loads(self.line or b"")["params"]["_meta"]["progressToken"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        return token if isinstance(token, int | str) else None


class Link:
    """A connection to one engine process, and the requests that it has not answered."""

    def __init__(self, connection: socket.socket, reply: dict[str, object]) -> None:
        self.connection = connection
        self.pid = reply.get("pid")
        # How long the engine may be silent before its calls are given up; None if it sends no signs of life.
        limit = reply.get("silence_s")
        self.limit_s = float(limit) if isinstance(limit, int | float) else None
        self.silent_s = 0.0
        self.dead = False
        self.waiting: dict[Id, Unanswered] = {}  # the host's requests
        self.asked: set[Id] = set()  # the engine's own requests, which the host has not answered
        self.progress: dict[Id, float] = {}  # the latest value for each token, to go on from
        self.own_handshake: Id | None = None  # the id of the relay's own handshake, whose answer is not for the host
        self.shaken_hands = threading.Event()
        self.acknowledged: set[Id] = set()  # requests to listen that the relay has acknowledged
        self.late: list[Id] = []  # requests that were given up, to cancel if the engine lives after all
        self._given_up: set[Id] = set()  # requests that the relay has answered; the engine's answers come too late
        self._num_sent = 0  # lines
        self._last_notice: tuple[int, list[Id]] | None = None  # lines read and requests returned, as in ENDING
        self._lock = threading.Lock()

    def expect(self, id_: Id, method: str, line: bytes | None) -> bool:
        """Note a request before it is sent; returns False if the engine is gone."""
        with self._lock:
            if not self.dead:
                self.waiting[id_] = Unanswered(method, line, self._num_sent + 1)
                self._given_up.discard(id_)
            return not self.dead

    def forget(self, id_: Id) -> None:
        """Note that the host no longer waits for a request."""
        with self._lock:
            self.waiting.pop(id_, None)

    def note_answer(self, id_: Id) -> bool:
        """Note that the host answers a request of the engine; returns False if this engine has not sent it."""
        with self._lock:
            known = id_ in self.asked
            self.asked.discard(id_)
        return known

    def note_from_engine(self, line: bytes) -> bool:
        """Note a line of the engine; returns False if it is not for the host."""
        seen = envelope(line)
        if seen.id is None:
            return self._note_notification(line, seen.method)
        with self._lock:
            if seen.method:
                self.asked.add(seen.id)
            elif seen.id == self.own_handshake:
                self.own_handshake = None
                self.shaken_hands.set()
                return False
            elif seen.id in self._given_up:
                self._given_up.discard(seen.id)
                return False
            else:
                self.waiting.pop(seen.id, None)
        return True

    def _note_notification(self, line: bytes, method: str) -> bool:
        if method == ALIVE:
            return False
        if method == ENDING:
            params = json.loads(line)["params"]
            self._last_notice = params["num_read"], params["returned"]
            return False
        if method == ACKNOWLEDGED and self.acknowledged:
            with contextlib.suppress(ValueError, LookupError, TypeError):
                self.acknowledged.remove(json.loads(line)["params"]["_meta"][SUBSCRIPTION])
                return False
        if method == "notifications/progress":
            with contextlib.suppress(ValueError, LookupError, TypeError):
                params = json.loads(line)["params"]
                self.progress[params["progressToken"]] = float(params["progress"])
                while len(self.progress) > MAX_TOKENS:
                    del self.progress[next(iter(self.progress))]
        return True

    def read(self, num_bytes: int, silent: Callable[[Link], None]) -> bytes:
        """Read what the engine sends; nothing at its end. Calls `silent` for every TICK_S without data.

        Only the time that was spent waiting here is counted: a relay that was stopped itself, or whose host does not
        read, has not waited for the engine.
        """
        try:
            while not select.select([self.connection], [], [], TICK_S)[0]:
                if self.limit_s is not None:
                    self.silent_s += TICK_S
                    silent(self)
            self.silent_s = 0.0
            return self.connection.recv(num_bytes)
        except (OSError, ValueError):  # a descriptor that was closed meanwhile
            return b""

    def give_up(self) -> dict[Id, Unanswered]:
        """Take the calls that wait for an engine without signs of life. Its later answers to them are dropped."""
        with self._lock:
            left = {id_: request for id_, request in self.waiting.items() if request.method not in LISTENING}
            for id_ in left:
                del self.waiting[id_]
            self._given_up.update(left)
            self.late.extend(left)
        return left

    def take_late(self) -> list[Id]:
        """Take the requests that have to be cancelled in the engine."""
        with self._lock:
            late, self.late = self.late, []
        return late

    def end(self) -> tuple[dict[Id, Unanswered], list[bytes]]:
        """End the link; returns the requests that were taken up and not answered, and lines that were not taken up."""
        with self._lock:
            self.dead = True
            left, self.waiting = self.waiting, {}
        self.shaken_hands.set()
        again = []
        if self._last_notice is not None:
            num_read, returned = self._last_notice
            for id_, request in list(left.items()):
                if request.line is not None and (request.number > num_read or id_ in returned):
                    again.append(request.line)
                    del left[id_]
        return left, again

    def send(self, data: bytes) -> None:
        """Send data. If it does not arrive, that is noticed where answers are read.

        If the engine reads nothing and has shown no life for `limit_s`, the connection is closed.
        """
        self._num_sent += data.count(b"\n")
        view = memoryview(data)
        try:
            while view:
                if select.select([], [self.connection], [], TICK_S)[1]:
                    with contextlib.suppress(BlockingIOError):
                        view = view[self.connection.send(view, socket.MSG_DONTWAIT) :]
                elif self.limit_s is not None and self.silent_s > self.limit_s:
                    self.dead = True  # half a line was sent
                    self.hang_up()
                    return
        except (OSError, ValueError):
            self.hang_up()

    def hang_up(self, how: int = socket.SHUT_RDWR) -> None:
        """Close one direction or both. Requests without an answer are found where answers are read."""
        with contextlib.suppress(OSError):  # it is gone already
            self.connection.shutdown(how)
