"""The first line of a connection and the answer to it. They are JSON; descriptors may come with the first line."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from mlx_mcp.errors import ConfigError

MAX_HELLO_BYTES = 1 << 16


async def receive_hello(connection: socket.socket, fds: list[int]) -> dict[str, Any] | None:
    """Receive the first line of a connection, and append its descriptors to `fds`; None if there is no line.

    A client that only checks whether we listen sends none.

    Raises:
        ConfigError: the line is not a hello.
    """
    loop, line = asyncio.get_running_loop(), b""
    while not line.endswith(b"\n"):
        await readable(loop, connection)
        data, more, _, _ = socket.recv_fds(connection, MAX_HELLO_BYTES, 1)
        fds += more
        line += data
        if not data and not line:
            return None
        if not data or len(line) > MAX_HELLO_BYTES:
            break
    try:
        hello = json.loads(line)
    except ValueError:
        hello = None
    if not isinstance(hello, dict):
        raise ConfigError("The engine was not greeted right; connect with `mlx-mcp serve`.")
    return hello


async def readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    """Wait until there is something to read."""
    ready: asyncio.Future[None] = loop.create_future()

    def set_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, set_readable)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


async def reply(connection: socket.socket, message: dict[str, Any]) -> None:
    """Answer a hello."""
    await asyncio.get_running_loop().sock_sendall(connection, json.dumps(message).encode() + b"\n")
