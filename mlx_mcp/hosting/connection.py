"""Serves one window or listener that has connected to the engine process."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
from mcp_types import CLIENT_INFO_META_KEY, JSONRPCMessage
from starlette.types import Receive, Scope, Send

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError
from mlx_mcp.hosting.faces import web_app
from mlx_mcp.hosting.http import HttpServer, drain_http
from mlx_mcp.hosting.message_lines import StreamLines
from mlx_mcp.hosting.open_requests import OpenRequests
from mlx_mcp.hosting.stdio import serve_lines
from mlx_mcp.process.front import surface_digest
from mlx_mcp.process.lines import ALIVE, ALIVE_S, ENDING, notice
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

CLOSE_S = 2.0


@dataclass(eq=False)
class Connection:
    """A window or a listener."""

    number: int
    kind: str  # "stdio" or "http"
    pid: int
    hello: dict[str, Any]
    socket: socket.socket
    model: str = ""
    host: str = ""  # the client's name, as it says itself
    since: float = field(default_factory=time.monotonic)
    activity: Activity = field(default_factory=Activity)
    requests: OpenRequests = field(default_factory=OpenRequests)  # of a window

    @property
    def busy(self) -> bool:
        """Whether a client of it waits for an answer."""
        return self.requests.waiting or self.activity.busy

    @property
    def takes_notices(self) -> bool:
        """Whether it understands the engine's own notices, which are not for its host."""
        return bool(self.hello.get("notices"))


@dataclass(frozen=True)
class Serving:
    """What a connection is served with. `used` is called for every message or request."""

    own: Config  # its settings
    service: Service
    limits: Config  # the settings of the engine
    sandboxes: Sandboxes
    used: Callable[[], None]


async def serve_window(joined: Connection, serving: Serving, ends: asyncio.Event) -> None:
    """Serve the lines of one host until its end. If this process `ends`, the last line names those not taken up."""
    own, folder = serving.own, joined.hello.get("folder")
    files = FileReader.of_window(own.file_roots, folder, *own.file_limits)
    stale = stale_lists(joined.hello)
    server = build_server(serving.service, files, joined.activity, own.wait_s, stale, serving.sandboxes)
    lines, stream = await asyncio.open_connection(sock=joined.socket)

    async def write(data: bytes) -> None:
        stream.write(data)
        await stream.drain()

    def seen(message: JSONRPCMessage) -> None:
        serving.used()
        joined.host = joined.host or client_name(message)

    async def show_life() -> None:
        while True:
            await anyio.sleep(ALIVE_S)
            if not stream.transport.get_write_buffer_size():  # otherwise there is other data to read
                stream.write(notice(ALIVE))

    try:
        limit = serving.limits.max_request_bytes
        async with anyio.create_task_group() as tasks:
            if joined.takes_notices:
                tasks.start_soon(show_life)
            await serve_lines(server, StreamLines(lines, limit).next, write, limit, joined.requests, seen)
            tasks.cancel_scope.cancel()
    finally:
        if joined.takes_notices and ends.is_set():
            requests = joined.requests
            stream.write(notice(ENDING, num_read=requests.num_read, returned=requests.returned))
        stream.close()
        # The last lines may still be in buffers. A client that does not read is waited for only so long.
        with anyio.move_on_after(CLOSE_S, shield=True), suppress(OSError):
            await stream.wait_closed()
        stream.transport.abort()


async def serve_listener(joined: Connection, fds: list[int], serving: Serving, servers: list[HttpServer]) -> None:
    """Serve HTTP on a listening socket that came with the hello, until the connection that brought it ends.

    The server is in `servers` as long as it serves.
    """
    if len(fds) != 1:
        raise ConfigError("A listener comes with one socket; connect with `mlx-mcp serve --http`.")
    listener = socket.socket(joined.hello["family"], socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=fds.pop())
    listener.setblocking(False)
    app = web_app(serving.service, joined.activity, serving.own, sandboxes=serving.sandboxes)

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        serving.used()
        await app(scope, receive, send)

    server = HttpServer(noted, serving.own)
    servers.append(server)
    try:
        async with anyio.create_task_group() as tasks:

            async def until_closed() -> None:
                with suppress(OSError):
                    await asyncio.get_running_loop().sock_recv(joined.socket, 1)
                await drain_http(server, joined.activity, serving.limits.shutdown_timeout_s)

            async def show_life() -> None:
                with suppress(OSError):
                    while True:
                        await anyio.sleep(ALIVE_S)
                        await asyncio.get_running_loop().sock_sendall(joined.socket, notice(ALIVE))

            tasks.start_soon(until_closed)
            if joined.takes_notices:
                tasks.start_soon(show_life)
            await server.serve(sockets=[listener])
            tasks.cancel_scope.cancel()
    finally:
        servers.remove(server)
        listener.close()


def stale_lists(hello: dict[str, Any]) -> tuple[str, ...]:
    """The lists of which a host may have been told something else before: by its relay, or by the engine before."""
    if hello.get("surface", surface_digest()) != surface_digest():
        return ("tools", "prompts", "resources")
    return ("resources",) if hello.get("again") else ()


def client_name(message: JSONRPCMessage) -> str:
    """The client's name for itself: in its `initialize`, or in any request of the newer protocol era."""
    params: Any = getattr(message, "params", None) or {}
    with suppress(AttributeError, TypeError):
        told = params.get("clientInfo") or (params.get("_meta") or {}).get(CLIENT_INFO_META_KEY) or {}
        return f"{told.get('name', '')} {told.get('version', '')}".strip()[:80]
    return ""
