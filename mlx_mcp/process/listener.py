"""`mlx-mcp serve --http`: holds a TCP socket that the user's engine process serves, as long as this process lives.

The engine gets the listening socket itself, so that there is one copy of the weights and no data passes through here.
If the engine ends, clients that connect wait in the socket's queue, and the first of them has another engine started.
While the engine shows no sign of life, clients that connect are told so.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

from mlx_mcp.errors import ConfigError, MlxMcpError
from mlx_mcp.process.daemon import Joined, join
from mlx_mcp.process.link import TICK_S
from mlx_mcp.process.place import Place

HUNG = (
    "The engine (process {pid}) has shown no sign of life for {seconds:.0f} s: it was stopped, or it hangs. "
    "`mlx-mcp engine stop --force` ends it, and the next request starts another."
)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Clients that connect from now on wait, and are not refused.

    Raises:
        ConfigError: the address is taken, or does not belong to this machine.
    """
    try:
        # With its protocol: asyncio turns Nagle's delay off only where it is told that this is TCP (40 ms a call).
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as opened:
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
            opened.pop_all()  # it is the caller's
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror}. Choose another with --port.") from error
    return listener


def hold(
    place: Place,
    hello: dict[str, object],
    listener: socket.socket,
    say: Callable[[str], None],
    serving: Callable[[dict[str, object]], None],
    timeout_s: float,
) -> None:
    """Have the engine serve a listening socket until a signal comes. `serving` gets the first reply of an engine.

    Raises:
        MlxMcpError: no engine can be started, or it refuses.
    """
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    again = False
    while True:
        # An engine that is starting needs nobody. Not SystemExit: raised at a bad moment, as in a destructor, it may be
        # lost, and the signal with it.
        on_signals(lambda *_: os._exit(0))
        try:
            asked = hello | {"family": int(listener.family), "again": again, "notices": True}
            joined = join(place, asked, say, (listener.fileno(),))
        except MlxMcpError:
            signal.set_wakeup_fd(-1)  # if this process serves alone, the number may become another descriptor's
            raise
        if not again:
            serving(joined.reply)
        again, connection = True, joined.connection
        on_signals(lambda *_: None)
        until_ended(joined, woken, listener, say)
        if is_ready(woken):
            break
        connection.close()  # the engine has ended
        select.select([listener, woken], [], [])
        if is_ready(woken):
            return
    on_signals(signal.SIG_DFL)  # a second signal ends this process at once
    connection.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + timeout_s
    while select.select([connection], [], [], max(0.0, deadline - time.monotonic()))[0] and connection.recv(4096):
        pass


def until_ended(joined: Joined, woken: socket.socket, listener: socket.socket, say: Callable[[str], None]) -> None:
    """Wait until the engine ends or a signal comes.

    If it shows no sign of life for too long, clients that connect get status 503.
    """
    limit = joined.reply.get("silence_s")
    limit_s = float(limit) if isinstance(limit, int | float) else math.inf
    silent_s, hung, text = 0.0, False, ""
    while True:
        ready = select.select([joined.connection, woken, *([listener] if hung else [])], [], [], TICK_S)[0]
        if woken in ready:
            return
        if joined.connection in ready:
            if not joined.connection.recv(4096):
                return
            if hung:
                say(f"the engine, process {joined.reply['pid']}, shows life again")
            silent_s, hung = 0.0, False
        elif listener in ready:
            refuse(listener, text)
        else:
            silent_s += TICK_S
            if silent_s >= limit_s and not hung:
                hung, text = True, HUNG.format(pid=joined.reply["pid"], seconds=silent_s)
                say(text)


def refuse(listener: socket.socket, text: str) -> None:
    """Answer the next client that connects with status 503."""
    try:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(TICK_S)
            connection.recv(1 << 16)  # otherwise the system would discard the answer
            body = json.dumps({"error": text}).encode()
            head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 10\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
            connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + TICK_S  # a client that sends on and on must not hold up the others
            while time.monotonic() < deadline and connection.recv(1 << 16):
                pass
    except OSError:  # it has gone, says nothing, or the engine has taken it after all
        pass


def on_signals(handler: Callable[..., object] | signal.Handlers) -> None:
    """Install a handler for SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def is_ready(connection: socket.socket) -> bool:
    """Whether there is something to read."""
    return bool(select.select([connection], [], [], 0)[0])
