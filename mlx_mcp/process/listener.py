"""`mlx-mcp serve --http`: holds a TCP socket that the user's engine process serves, as long as this process lives.

The engine gets the listening socket itself, so that there is one copy of the weights and nothing is pumped. If the
engine ends, who connects waits in the socket's queue, and the first who does has another engine started.
"""

from __future__ import annotations

import select
import signal
import socket
import sys
import time
from collections.abc import Callable

from mlx_mcp.errors import ConfigError, MlxMcpError
from mlx_mcp.process.daemon import join
from mlx_mcp.process.place import Place


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: who connects from now on waits, and is not refused.

    Raises:
        ConfigError: the address is taken, or not this machine's.
    """
    try:
        # With its protocol: asyncio turns Nagle's delay off only where it is told that this is TCP (40 ms a call).
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
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
    """Have the engine serve a listening socket until a signal comes; `serving` gets its reply when it first does.

    Raises:
        MlxMcpError: the engine cannot be had, or refuses.
    """
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    again = False
    while True:
        on_signals(lambda *_: sys.exit(0))  # an engine that starts can be left to it
        try:
            joined = join(place, hello | {"family": int(listener.family), "again": again}, say, (listener.fileno(),))
        except MlxMcpError:
            signal.set_wakeup_fd(-1)  # this process may serve alone, and then its number may be another descriptor's
            raise
        if not again:
            serving(joined.reply)
        again, connection = True, joined.connection
        on_signals(lambda *_: None)
        select.select([connection, woken], [], [])
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


def on_signals(handler: Callable[..., object] | signal.Handlers) -> None:
    """Have SIGTERM and SIGINT do this."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def is_ready(connection: socket.socket) -> bool:
    """Whether something is there to read."""
    return bool(select.select([connection], [], [], 0)[0])
