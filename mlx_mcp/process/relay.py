"""`mlx-mcp serve` over stdio: a pump between the host and the user's engine process, up in a blink.

Guarantees:
    - Whole lines go through as they are, in order, and nothing else reaches stdout; the engine checks them. Of each
      only the top level is looked at. One that is longer than LONGEST_LINE goes through in pieces, of which the first
      is looked at: memory for a line is bounded.
    - Every request that the engine has not answered when it ends is answered here, once, and says to try again.
    - After the engine has ended the next request finds or starts another, which has been shaken hands with first.
      Nobody starts one without need: `engine stop` and an idle exit last until then.
    - The end of stdin ends the engine's work for this host, and this process within EXIT_S.
    - One lock guards each link's requests, another stdout; neither is held while the engine is written to.

Knows ids, methods and the handshake of MCP, and nothing else of it. Standard library only, and little of that: it is
what every window of every host keeps in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from mlx_mcp.errors import MlxMcpError
from mlx_mcp.process.daemon import join, window
from mlx_mcp.process.place import Place, user_place

LONGEST_LINE = (4 << 20) + 1024  # a little more than the engine takes, unless it was set to take more
CHUNK = 1 << 16
HANDSHAKE_S = 30.0
EXIT_S = 10.0
TRIES = 3  # engines that end before they are asked anything
INTERNAL_ERROR = -32603

# A string, or a bracket; possessive, so that a long string takes no memory.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[][{}]', re.DOTALL)
_MEMBER = re.compile(rb'"(id|method|result|error)"\s*:\s*("(?:[^"\\]++|\\.)*+"|-?[0-9]+(?![0-9.eE]))?', re.DOTALL)

Id = int | str


class Envelope:
    """What the top level of a line says: a request has method and id, a notification a method, an answer an id.

    An answer has a result or an error, too; a line with an id and nothing else is for the engine to complain about.
    """

    __slots__ = ("answers", "id", "method")

    def __init__(self, id: Id | None, method: str, answers: bool) -> None:
        self.id, self.method, self.answers = id, method, answers


def envelope(line: bytes) -> Envelope:
    """Look at a line; one that is no message has neither id nor method."""
    depth, id_, method, answers = 0, None, "", False
    for token in _TOKEN.finditer(line):
        first = line[token.start()]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
        elif depth == 1 and (member := _MEMBER.match(line, token.start())) is not None:
            if member[1] in (b"result", b"error"):
                answers = True
            if member[2] is None:
                continue
            try:
                value = json.loads(member[2])
            except ValueError:
                continue
            if member[1] == b"id":
                id_ = value
            elif member[1] == b"method" and isinstance(value, str):
                method = value
    return Envelope(id_, method, answers and not method)


def pieces(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bool, bool]]:
    """What is read, line by line: (data, whether a line begins with it, whether a line ends with it).

    A line of at most LONGEST_LINE comes whole.
    """
    buffer, first = bytearray(), True
    while chunk := read(CHUNK):
        start = 0
        while (end := chunk.find(b"\n", start) + 1) > 0:
            yield bytes(buffer) + chunk[start:end], first, True
            buffer.clear()
            first, start = True, end
        buffer += chunk[start:]
        if len(buffer) > LONGEST_LINE:
            yield bytes(buffer), first, False
            buffer.clear()
            first = False
    if buffer:
        yield bytes(buffer), first, True


class Link:
    """A connection to one engine process, and the requests that it has not answered."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.dead = False
        self.waiting: dict[Id, str] = {}  # the host's requests: id → method
        self.asked: set[Id] = set()  # the engine's own requests, which the host has not answered
        self.swallow: Id | None = None  # the answer to this is the relay's own
        self.greeted = threading.Event()
        self._lock = threading.Lock()

    def expect(self, id_: Id, method: str) -> bool:
        """Note a request before it is sent; False if nobody would answer it any more."""
        with self._lock:
            if not self.dead:
                self.waiting[id_] = method
            return not self.dead

    def forget(self, id_: Id) -> None:
        """The host does not wait for this one any more."""
        with self._lock:
            self.waiting.pop(id_, None)

    def answered(self, id_: Id) -> bool:
        """Whether this engine had asked the host that, who answers now."""
        with self._lock:
            known = id_ in self.asked
            self.asked.discard(id_)
        return known

    def passes(self, line: bytes) -> bool:
        """Note what the engine says; False if it is not for the host."""
        seen = envelope(line)
        if seen.id is None:
            return True
        with self._lock:
            if seen.method:
                self.asked.add(seen.id)
            elif seen.id == self.swallow:
                self.swallow = None
                self.greeted.set()
                return False
            else:
                self.waiting.pop(seen.id, None)
        return True

    def end(self) -> dict[Id, str]:
        """Nothing comes any more: what was not answered."""
        with self._lock:
            self.dead = True
            left, self.waiting = self.waiting, {}
        self.greeted.set()
        return left

    def send(self, data: bytes) -> None:
        """Send; that it does not arrive is found out where answers are read."""
        try:
            self.connection.sendall(data)
        except OSError:
            self.hang_up()

    def hang_up(self, how: int = socket.SHUT_RDWR) -> None:
        """Close one direction or both; what was not answered is found where answers are read."""
        with contextlib.suppress(OSError):  # it is gone already
            self.connection.shutdown(how)


class Relay:
    """One host's end; `host_in` and `host_out` are descriptors."""

    def __init__(self, place: Place, hello: dict[str, object], host_in: int = 0, host_out: int = 1) -> None:
        self._place, self._hello, self._in, self._out = place, hello, host_in, host_out
        self._out_lock = threading.Lock()
        self._link: Link | None = None
        self._listener: threading.Thread | None = None
        self._to: Link | None = None  # where the pieces of a long line go
        self._leaving = False
        self._initialize = self._initialized = b""
        self._initialize_id: Id | None = None

    def run(self) -> None:
        """Pump until the host goes away.

        Raises:
            MlxMcpError: there is no engine to begin with, and none can be started.
        """
        self._connect()
        for data, first, last in pieces(self._read):
            if first and last:
                self._line(data)
            else:
                self._piece(data, first)
        self._leaving = True
        if self._link is not None and self._listener is not None:
            self._link.hang_up(socket.SHUT_WR)
            self._listener.join(EXIT_S)

    def _read(self, num_bytes: int) -> bytes:
        try:
            return os.read(self._in, num_bytes)
        except OSError:
            return b""

    # The host's lines, on the main thread

    def _line(self, line: bytes) -> None:
        seen = envelope(line)
        if not seen.method or seen.id is None:
            self._tell(line, seen)
            return
        if seen.method == "initialize":
            self._initialize, self._initialize_id, self._initialized = line, seen.id, b""
        for _ in range(TRIES):
            link = self._link
            if link is None or link.dead:
                try:
                    link = self._connect(again=seen.method != "initialize")
                except MlxMcpError as error:
                    self._say(self._failure(seen.id, seen.method, f"There is no engine: {error} Then call again."))
                    return
            if link.expect(seen.id, seen.method):
                link.send(line)
                return
        self._say(self._failure(seen.id, seen.method, LOST))

    def _piece(self, data: bytes, first: bool) -> None:
        """Pass on a piece of a line that is too long to look at, to the engine that its beginning went to."""
        if first:
            seen, link = envelope(data), self._link
            self._to = link if link is not None and not link.dead else None
            if seen.method and seen.id is not None and (link is None or not link.expect(seen.id, seen.method)):
                self._say(self._failure(seen.id, seen.method, LOST))
        if self._to is not None:
            self._to.send(data)

    def _tell(self, line: bytes, seen: Envelope) -> None:
        """Pass on what needs no answer, or what answers the engine; to an engine that is gone it says nothing."""
        link = self._link
        if seen.method == "notifications/initialized":
            self._initialized = line
        if link is None or link.dead:
            if line.strip() and not seen.method and not seen.answers:  # no message: the engine would have said so
                self._say(
                    {"jsonrpc": "2.0", "id": seen.id, "error": {"code": -32700, "message": "Not a JSON-RPC message."}}
                )
            return
        if seen.method == "notifications/cancelled":
            with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
                link.forget(json.loads(line)["params"]["requestId"])
        elif seen.answers and seen.id is not None and not link.answered(seen.id):
            return  # to what an engine asked that is gone
        link.send(line)

    def _connect(self, again: bool = False) -> Link:
        """Find or start an engine, and shake hands with it as the host did."""
        joined = join(self._place, self._hello | {"again": again}, tell)
        link = Link(joined.connection)
        handshake = again and bool(self._initialize)
        if handshake:
            link.swallow = self._initialize_id
        listener = threading.Thread(target=self._listen, args=(link,), name="engine", daemon=True)
        listener.start()
        if handshake:
            link.send(self._initialize)
            link.greeted.wait(HANDSHAKE_S)
            if self._initialized:
                link.send(self._initialized)
        self._link, self._listener = link, listener
        return link

    # The engine's lines, on a thread for each link

    def _listen(self, link: Link) -> None:
        def read(num_bytes: int) -> bytes:
            try:
                return link.connection.recv(num_bytes)
            except OSError:
                return b""

        ended = True
        for data, first, last in pieces(read):
            if first and last:
                if not data.endswith(b"\n"):  # the engine ended within it
                    break
                if not link.passes(data):
                    continue
            self._write(data)
            ended = data.endswith(b"\n")
        if not ended:
            self._write(b"\n")
        left = link.end()
        link.connection.close()
        if self._leaving:
            return
        for id_ in link.asked:
            self._say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id_}})
        for id_, method in left.items():
            self._say(self._failure(id_, method, LOST))

    def _failure(self, id_: Id, method: str, text: str) -> dict[str, object]:
        """The answer to a request that came to nothing.

        To a tool call it is a tool's error: hosts show their model its text, and of a protocol error hardly anything.
        """
        if method != "tools/call":
            return {"jsonrpc": "2.0", "id": id_, "error": {"code": INTERNAL_ERROR, "message": text}}
        result: dict[str, object] = {"content": [{"type": "text", "text": text}], "isError": True}
        if not self._initialize:  # only the newer era has no handshake, and has this
            result["resultType"] = "complete"
        return {"jsonrpc": "2.0", "id": id_, "result": result}

    def _say(self, message: dict[str, object]) -> None:
        self._write(json.dumps(message).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        with self._out_lock:
            view = memoryview(data)
            try:
                while view:
                    view = view[os.write(self._out, view) :]
            except OSError:  # the host does not listen any more
                os._exit(0)


LOST = (
    "The engine process ended during this call, so its answer is lost; it may have been stopped, replaced or killed. "
    "Call again: a new one is started by itself. Sessions that were not persisted are gone: list_sessions shows which "
    "there are."
)


def tell(note: str) -> None:
    """Say something to the user; hosts keep stderr in their logs."""
    print(f"mlx-mcp: {note}", file=sys.stderr, flush=True)


def tell_a_terminal() -> None:
    """Say to a user who started this by hand what it waits for; a host starts it with a pipe."""
    if sys.stdin is not None and sys.stdin.isatty():
        tell(
            "waiting for an MCP host, which starts this command itself.\n"
            "  Claude Code does so after:  claude mcp add mlx -- mlx-mcp serve\n"
            "  For other hosts see the README.\n"
            '  To ask a model right here:  mlx-mcp run "Hello"\n'
            "  Ctrl-D ends this."
        )


def serve_options(arguments: list[str]) -> dict[str, str] | None:
    """What `mlx-mcp serve` was given, if a relay can do it: model and openblas. None leaves it to the command line."""
    given: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if argument in ("--model", "-m"):
            value, equals = next(rest, ""), "="
        if name in ("--model", "-m") and equals and value:
            given["model"] = value
        elif argument in ("--openblas", "--no-openblas"):
            given["openblas"] = "0" if argument.startswith("--no") else "1"
        else:
            return None
    return given


def serve(model: str | None = None, openblas: bool | None = None) -> None:
    """Relay between stdin, stdout and the user's engine until the host goes away or a signal comes.

    Raises:
        NoSharedEngine: there can be no such process here.
        MlxMcpError: the engine does not start, or refuses this window.
    """
    if openblas is not None:
        os.environ["MLX_MCP_OPENBLAS"] = "1" if openblas else "0"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    tell_a_terminal()
    Relay(user_place(), window("stdio", model)).run()
