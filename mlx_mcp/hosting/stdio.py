"""MCP over lines of stdin and stdout or of a socket, with guarantees that the SDK's own transport does not give.

Guarantees:
    - Nothing but protocol lines reaches stdout: `take_stdio` takes both standard descriptors before anything else runs.
    - Every line is answered or obeyed. A line that is too long, not UTF-8 or not a message gets an error, under its own
      id if that can be read, and the server continues.
    - Memory for a line is bounded by `max_request_bytes`.
    - `OpenRequests` has at any time the requests that were read and are not answered on the wire. A server that waits
      until there are none loses no answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

import anyio
import anyio.to_thread
from mcp.server.mcpserver import MCPServer
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp_types import JSONRPCError, JSONRPCMessage, JSONRPCRequest, JSONRPCResponse, RequestId

from mlx_mcp.hosting.message_lines import FileLines, LineWriter, NextLine, Write, messages, write_all
from mlx_mcp.hosting.open_requests import OpenRequests


def take_stdio() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for the protocol. From now on prints go to stderr, and stdin is empty for others.

    Call before anything that may print is imported.
    """
    wire_in, wire_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return wire_in, wire_out


async def serve_stdio(
    server: MCPServer[Any], wire_in: BinaryIO, wire_out: BinaryIO, max_request_bytes: int, requests: OpenRequests
) -> None:
    """Serve one client until it closes its end, or stdout breaks. Calls that still run then are cancelled."""

    async def write(data: bytes) -> None:
        # Not abandoned on cancel: half a line would break every line after it.
        await anyio.to_thread.run_sync(write_all, wire_out, data)

    await serve_lines(server, FileLines(wire_in, max_request_bytes).next, write, max_request_bytes, requests)


async def serve_lines(
    server: MCPServer[Any],
    next_line: NextLine,
    write: Write,
    max_request_bytes: int,
    requests: OpenRequests,
    seen: Callable[[JSONRPCMessage], None] = lambda _: None,
) -> None:
    """Serve one client whose lines come from `next_line` until there are no more, or until `write` fails.

    `requests` counts its requests, and `seen` is called for every message.
    """
    writer = LineWriter(write)
    to_server, read_stream = anyio.create_memory_object_stream[SessionMessage | Exception]()
    write_stream, from_server = anyio.create_memory_object_stream[SessionMessage]()

    async def read() -> None:
        async with to_server:
            async for message in messages(next_line, writer, max_request_bytes, requests):
                seen(message)
                settled = None
                if isinstance(message, JSONRPCRequest):
                    if not requests.take(message):
                        continue
                    settled = ServerMessageMetadata(on_request_unanswered=partial(settle, requests, message.id))
                await to_server.send(SessionMessage(message, settled))

    async def answer() -> None:
        async with from_server:
            async for sent in from_server:
                await writer.write(sent.message.model_dump_json(by_alias=True, exclude_unset=True) + "\n")
                if isinstance(sent.message, JSONRPCResponse | JSONRPCError) and sent.message.id is not None:
                    requests.settle(sent.message.id)

    lowlevel = server._lowlevel_server  # MCPServer has no public way to run on given streams (mcp 2.3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.cancel_when_broken, tasks.cancel_scope)
        async with anyio.create_task_group() as transport:
            transport.start_soon(read)
            transport.start_soon(answer)
            await lowlevel.run(read_stream, write_stream, lowlevel.create_initialization_options())
        tasks.cancel_scope.cancel()


async def settle(requests: OpenRequests, id_: RequestId) -> None:
    """Note a request that the SDK leaves unanswered; the SDK calls this."""
    requests.settle(id_)
