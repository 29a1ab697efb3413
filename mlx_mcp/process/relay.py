"""`mlx-mcp serve` over stdio: passes lines between the host and the user's engine process. Starts fast.

Guarantees:
    - Lines are passed on unchanged and in order, and nothing else reaches stdout. The engine checks them; here only
      their top level is parsed. A line longer than LONGEST_LINE is passed on in pieces, of which the first is parsed,
      so that memory for a line is bounded.
    - The host is read from the first moment on. Until there is an engine, `Front` answers the handshake and the lists;
      what only an engine can answer waits for it, MAX_WAITING_BYTES at most, or is answered with why there is none.
    - When the engine ends, every request that it has not answered is answered here, once, with the advice to try
      again. A request that the engine says it has not taken up goes to the next engine instead.
    - While the engine shows no life, waiting calls are told so in their progress. After the time that the engine has
      stated, each is answered with an error. A request whose id is neither string nor integer is answered at once.
    - After the engine has ended, the next request finds or starts another. The MCP handshake is repeated with it
      first. Nothing else starts an engine: `engine stop` and an idle exit last until then.
    - The end of stdin ends the engine's work for this host, and this process within EXIT_S.
    - One thread reads the host, one finds or starts the first engine, and one for each engine reads that. One lock
      guards each link's requests, another guards stdout, and a third lets one line at a time be sent; `_sending` guards
      everything else here, too.

Knows ids, methods and the handshake of MCP, and nothing else of it. Standard library only, and little of that: every
window of every host keeps this process in memory.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import threading

from mlx_mcp.errors import EngineUnavailable, MlxMcpError, NoSharedEngine
from mlx_mcp.process.daemon import join
from mlx_mcp.process.endings import how_ended
from mlx_mcp.process.environment import window_hello
from mlx_mcp.process.front import OPENING_ID, Front, surface_digest
from mlx_mcp.process.lines import BAD_ID, LISTENING, Envelope, Id, envelope, pieces
from mlx_mcp.process.link import Link
from mlx_mcp.process.opening import Backlog, Handshake
from mlx_mcp.process.place import Place, user_place

EXIT_S = 10.0
TRIES = 3  # engines that end before they are asked anything
MAX_WAITING_BYTES = 8 << 20  # of lines that wait for the first engine; then the host is not read on
TELL_S = 5.0  # how often the host is told of an engine that shows no life
INTERNAL_ERROR, INVALID_REQUEST, PARSE_ERROR = -32603, -32600, -32700


class Relay:
    """The relay of one host; `host_in` and `host_out` are descriptors."""

    def __init__(self, place: Place, hello: dict[str, object], host_in: int = 0, host_out: int = 1) -> None:
        self._place, self._in, self._out = place, host_in, host_out
        self._hello = hello | {"notices": True, "surface": surface_digest()}
        self._out_lock = threading.Lock()
        self._sending = threading.RLock()
        self._front = Front()
        self._backlog = Backlog()
        self._over = threading.Event()
        self._failure_at_start: MlxMcpError | None = None
        self._link: Link | None = None
        self._listener: threading.Thread | None = None
        self._to: Link | None = None  # where the pieces of a long line go
        self._leaving = False
        self._handshake = Handshake()

    def run(self) -> None:
        """Pass lines on until the host goes away.

        Raises:
            NoSharedEngine: there can be no engine process here. The host is still read: see `serve_by`.
            MlxMcpError: there never was an engine, since none can be started; the host has gone away.
        """
        threading.Thread(target=self._read_host, name="host", daemon=True).start()
        threading.Thread(target=self._find_engine, name="start", daemon=True).start()
        self._over.wait()
        if self._failure_at_start is not None and self._link is None:
            raise self._failure_at_start

    def serve_by(self, connection: socket.socket) -> None:
        """Pass lines on to a server at the other end of `connection`, which may begin to read later."""
        threading.Thread(target=self._take, args=(Link(connection, {}),), name="alone", daemon=True).start()

    def wait_for_last_answers(self) -> None:
        """Wait until what the engine has said is passed on, for EXIT_S at most."""
        if self._listener is not None:
            self._listener.join(EXIT_S)

    def _find_engine(self) -> None:
        """Find or start the first engine. If there is none, whatever waits for it is told why."""
        try:
            self._connect()
        except NoSharedEngine as unshared:
            self._failure_at_start = unshared
            self._over.set()
        except (MlxMcpError, OSError) as failure:
            error = failure if isinstance(failure, MlxMcpError) else EngineUnavailable(f"{failure}.")
            self._failure_at_start = error
            if not self._leaving:
                tell(f"{error} Calls are answered with this, and each tries again.")
            with self._sending:
                self._pass_on_waiting(error)

    def _pass_on_waiting(self, error: MlxMcpError | None = None) -> None:
        """Send on the lines that wait for the first engine, or answer them with why there is none."""
        for line in self._backlog.take():
            seen = envelope(line)
            if error is not None and seen.method and seen.id is not None:
                self._say(self._failure(seen.id, seen.method, NO_ENGINE.format(error)))
            else:
                self._line(line)

    # The host's lines; the caller holds the lock for sending

    def _read_host(self) -> None:
        for data, first, last in pieces(lambda num_bytes: read(self._in, num_bytes)):
            if not (first and last) or self._backlog.num_bytes > MAX_WAITING_BYTES:
                self._backlog.settled.wait()
            with self._sending:
                if first and last:
                    self._line(data)
                else:
                    self._piece(data, first)
        self._leaving = True
        # An engine that is being started is waited for: to the end if lines wait for it, else to hear of its error.
        if not self._backlog.settled.wait(None if self._backlog.lines else EXIT_S):
            tell(f"The host went away, and after {EXIT_S:g} s it was not known whether an engine starts.")
        with self._sending:  # what has waited is sent by then
            if self._link is not None:
                self._link.hang_up(socket.SHUT_WR)
        self.wait_for_last_answers()
        self._over.set()

    def _line(self, line: bytes) -> None:
        seen = envelope(line)
        if self._refuse_bad_request(seen):
            return
        if not seen.method or seen.id is None:
            self._tell(line, seen)
            return
        answer = self._front.answer(line, seen) if self._link is None else None
        if seen.method == "initialize" and (answer or not self._backlog.open):
            self._handshake.begin(line, seen.id)
        if answer is not None:
            self._say(answer)
            return
        if self._backlog.open:
            if seen.method in LISTENING and (heard := self._front.acknowledge(line, seen)) is not None:
                self._say(heard)
                self._backlog.acknowledged.add(seen.id)
            self._backlog.add(line)
            return
        for _ in range(TRIES):
            link = self._link
            if link is None or link.dead:
                try:
                    link = self._connect(seen.method)
                except MlxMcpError as error:
                    self._say(self._failure(seen.id, seen.method, NO_ENGINE.format(error)))
                    return
            if link.expect(seen.id, seen.method, line):
                link.send(line)
                return
        self._say(self._failure(seen.id, seen.method, LOST))

    def _refuse_bad_request(self, seen: Envelope) -> bool:
        """Answer a request whose id is no id; returns whether it is one."""
        if seen.bad_request:
            self._say(protocol_error(None, INVALID_REQUEST, BAD_ID))
        return seen.bad_request

    def _piece(self, data: bytes, first: bool) -> None:
        """Pass on a piece of a line that is too long to parse, to the engine that got its first piece."""
        if first:
            seen, link = envelope(data), self._link
            self._to = link if link is not None and not link.dead and not self._refuse_bad_request(seen) else None
            if seen.method and seen.id is not None and (link is None or not link.expect(seen.id, seen.method, None)):
                text = LOST if link is not None else NO_ENGINE.format(self._failure_at_start)
                self._say(self._failure(seen.id, seen.method, text))
        if self._to is not None:
            self._to.send(data)

    def _tell(self, line: bytes, seen: Envelope) -> None:
        """Pass on a notification, or an answer to the engine. If the engine is gone, it is dropped."""
        link = self._link
        if seen.method == "notifications/initialized" and (self._handshake.initialize or not self._backlog.open):
            self._handshake.initialized = line
            if self._backlog.open:
                return  # it is repeated with the handshake
        if self._backlog.open:
            if seen.method == "notifications/cancelled" and (id_ := cancelled(line)) is not None:
                self._backlog.cancel(id_)
            else:
                self._backlog.add(line)
            return
        if link is None or link.dead:
            if line.strip() and not seen.method and not seen.answers:  # no message: the engine would have said so
                self._say(protocol_error(seen.id, PARSE_ERROR, "Not a JSON-RPC message. Send one message per line."))
            return
        if seen.method == "notifications/cancelled" and (id_ := cancelled(line)) is not None:
            link.forget(id_)
        elif seen.answers and seen.id is not None and not link.note_answer(seen.id):
            return  # an engine that is gone has asked for it
        link.send(line)

    def _connect(self, method: str = "") -> Link:
        """Find or start an engine, for the first time or for a request of this `method`."""
        again = self._link is not None and method != "initialize"
        joined = join(self._place, self._hello | {"again": again}, tell)
        return self._take(Link(joined.connection, joined.reply), repeat=method != "initialize")

    def _take(self, link: Link, repeat: bool = True) -> Link:
        """Use a link from now on. The host's handshake is repeated on it, unless the host is about to shake hands."""
        listener = threading.Thread(target=self._listen, args=(link,), name="engine", daemon=True)
        link.acknowledged = self._backlog.acknowledged
        with self._sending:
            listener.start()
            if repeat and self._handshake.initialize:
                self._handshake.repeat(link)
            elif (opening := self._front.opening) is not None:
                link.own_handshake = OPENING_ID
                link.send(opening)
            self._link, self._listener = link, listener
            if self._backlog.open:
                self._pass_on_waiting()
        return link

    # The engine's lines, on a thread for each link

    def _listen(self, link: Link) -> None:
        ended = True
        for data, first, last in pieces(lambda num_bytes: link.read(num_bytes, self._tell_silence)):
            self._cancel_late(link)
            if first and last:
                if not data.endswith(b"\n"):  # the engine ended within it
                    break
                if not link.note_from_engine(data):
                    continue
            self._write(data)
            ended = data.endswith(b"\n")
        if not ended:
            self._write(b"\n")
        left, again = link.end()
        link.connection.close()
        if self._leaving:
            return
        for id_ in link.asked:
            self._say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id_}})
        lost = LOST + how_ended(self._place, link.pid) if left else LOST
        for id_, request in left.items():
            self._say(self._failure(id_, request.method, lost))
        for line in again:  # no engine has carried these out, so they can be sent again
            with self._sending:
                self._line(line)

    def _tell_silence(self, link: Link) -> None:
        """Tell the waiting calls that the engine shows no life; after its limit, answer them with an error."""
        assert link.limit_s is not None
        if link.silent_s >= link.limit_s:
            for id_, request in link.give_up().items():
                self._say(self._failure(id_, request.method, HUNG.format(pid=link.pid, seconds=link.silent_s)))
        elif link.silent_s % TELL_S == 0:
            for request in list(link.waiting.values()):
                if (token := request.progress_token) is not None:
                    value = link.progress[token] = link.progress.get(token, 0.0) + 1e-3
                    text = SILENT.format(pid=link.pid, seconds=link.silent_s)
                    params = {"progressToken": token, "progress": value, "message": text}
                    self._say({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})

    def _cancel_late(self, link: Link) -> None:
        """Cancel the calls that were given up, now that the engine shows life again: its answers would be dropped."""
        if link.late and self._sending.acquire(blocking=False):  # else it is done with its next line
            try:
                for id_ in link.take_late():
                    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id_}}
                    link.send(json.dumps(cancel).encode() + b"\n")
            finally:
                self._sending.release()

    def _failure(self, id_: Id, method: str, text: str) -> dict[str, object]:
        """The answer to a request that failed.

        A tool call gets a tool error: hosts show its text to their model, and hardly anything of a protocol error.
        """
        if method != "tools/call":
            return protocol_error(id_, INTERNAL_ERROR, text)
        result: dict[str, object] = {"content": [{"type": "text", "text": text}], "isError": True}
        if not self._handshake.initialize:  # the newer protocol era has no handshake, and requires this
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


NO_ENGINE = "There is no engine: {} Then call again."

SILENT = "the engine (process {pid}) has shown no sign of life for {seconds:.0f} s"

HUNG = (
    "The engine (process {pid}) has shown no sign of life for {seconds:.0f} s: it was stopped, or it hangs. "
    "`mlx-mcp engine stop --force` ends it; then call again, and another is started. Sessions that were persisted are "
    "there again then."
)


def duplicate(descriptor: int) -> int:
    """The same under another number; the same number if it is closed."""
    try:
        return os.dup(descriptor)
    except OSError:
        return descriptor


def read(descriptor: int, num_bytes: int) -> bytes:
    """What comes next; nothing at the end, or if the descriptor is gone."""
    try:
        return os.read(descriptor, num_bytes)
    except OSError:
        return b""


def cancelled(line: bytes) -> Id | None:
    """The request that a notification cancels; None if it names none."""
    try:
        id_ = json.loads(line)["params"]["requestId"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return id_ if isinstance(id_, int | str) else None


def protocol_error(id_: Id | None, code: int, message: str) -> dict[str, object]:
    """A JSON-RPC error."""
    return {"jsonrpc": "2.0", "id": id_, "error": {"code": code, "message": message}}


def tell(note: str) -> None:
    """Tell the user something. Hosts keep stderr in their logs."""
    print(f"mlx-mcp: {note}", file=sys.stderr, flush=True)


def tell_a_terminal() -> None:
    """Tell a user who started this by hand what it waits for. A host starts it with a pipe."""
    if sys.stdin is not None and sys.stdin.isatty():
        tell(
            "waiting for an MCP host, which starts this command itself.\n"
            "  Claude Code does so after:  claude mcp add mlx -- mlx-mcp serve\n"
            "  For other hosts see the README.\n"
            '  To ask a model right here:  mlx-mcp run "Hello"\n'
            "  Ctrl-D ends this."
        )


def serve_options(arguments: list[str]) -> dict[str, str] | None:
    """The options of `mlx-mcp serve` that a relay can handle: model and openblas; None if there are others."""
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
        NoSharedEngine: there can be no engine process here. What serves stdin and stdout from now on serves the host.
        MlxMcpError: the host has gone away, and all the time the engine did not start, or refused this window.
    """
    if openblas is not None:
        os.environ["MLX_MCP_OPENBLAS"] = "1" if openblas else "0"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    tell_a_terminal()
    place = user_place()
    with contextlib.suppress(EngineUnavailable):  # the host is told at its first call
        place.prepare()
    relay = Relay(place, window_hello("stdio", model), duplicate(0), duplicate(1))
    try:
        relay.run()
    except NoSharedEngine:
        ours, theirs = socket.socketpair()
        for standard in (0, 1):
            os.dup2(theirs.fileno(), standard)
        relay.serve_by(ours)

        def pass_on_the_last() -> None:
            theirs.shutdown(socket.SHUT_WR)
            relay.wait_for_last_answers()

        atexit.register(pass_on_the_last)
        raise
