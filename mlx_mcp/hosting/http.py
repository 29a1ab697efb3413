"""Serves an HTTP app on sockets, and ends without losing an answer. Knows nothing of the app."""

from __future__ import annotations

import asyncio
import contextlib
import math
import select
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mcp.api.http.arrival import TimedProtocol
from mlx_mcp.config import Config
from mlx_mcp.hosting.lifetime import LAST_ANSWERS_S, drain
from mlx_mcp.hosting.tls import tls_context
from mlx_mcp.service.activity import Activity

LINGER_S = 0.5


class HttpServer(uvicorn.Server):
    """Uvicorn without signal handlers, and with an end that loses no answer.

    To end it: `stop_accepting`, wait while it is `busy`, `hang_up`. `drain_http` does this.
    """

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._app = app
        self._num_open = 0
        self._ending_until = math.inf
        tls = tls_context(config)
        graceful_s = math.ceil(config.shutdown_timeout_s + LAST_ANSWERS_S)
        super().__init__(
            uvicorn.Config(
                self._count,
                interface="asgi3",
                http=cast(Any, partial(TimedProtocol, config.request_timeout_s)),
                ws="none",
                log_config=None,  # the process's own log takes what it says, without a caller's words
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=graceful_s,
                proxy_headers=bool(config.trusted_proxies),
                forwarded_allow_ips=list(config.trusted_proxies),
                ssl_context_factory=None if tls is None else lambda *_: tls,
            )
        )

    @property
    def busy(self) -> bool:
        """Whether a client waits for an answer, or may have sent a request that has not arrived.

        A client may connect, or use an open connection, at the moment at which that would be closed. So connections
        are accepted for LINGER_S more. Each is closed with the answer to its last request, and those without any
        request are closed LINGER_S later.
        """
        transports = [c.transport for c in self._connections if c.transport is not None]
        return (
            self._num_open > 0
            or time.monotonic() < self._ending_until < math.inf
            or any(transport.get_write_buffer_size() for transport in transports)
            or has_unread(transports)
        )

    @property
    def _connections(self) -> list[Any]:
        return list(self.server_state.connections)

    def stop_accepting(self) -> None:
        """Accept no new connections after LINGER_S. Requests on open connections are still answered."""
        self._ending_until = time.monotonic() + 2 * LINGER_S
        for server in self.servers:
            asyncio.get_running_loop().call_later(LINGER_S, server.close)

    def hang_up(self) -> None:
        """Close every connection, also those with streams of notifications, and have `serve` return."""
        self.should_exit = True
        for connection in self._connections:
            if connection.transport is not None:
                connection.transport.close()

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, and count the requests that wait for an answer. A GET opens a stream, and is not counted."""
        if scope["type"] != "http" or scope["method"] == "GET":
            await self._app(scope, receive, send)
            return

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self._ending_until < math.inf:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        self._num_open += 1
        try:
            await self._app(scope, receive, send_last)
        finally:
            self._num_open -= 1

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield


def has_unread(transports: list[asyncio.Transport]) -> bool:
    """Whether one of the transports has data that was not read yet. Closing it would lose a request."""
    poll = select.poll()
    for transport in transports:
        if not transport.is_closing():
            poll.register(transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))


async def drain_http(server: HttpServer, activity: Activity, timeout_s: float) -> None:
    """End a server when all its requests are answered; after `timeout_s` they are answered with an error."""
    server.stop_accepting()
    await drain(lambda: server.busy, [activity.cut_off], timeout_s)
    server.hang_up()
