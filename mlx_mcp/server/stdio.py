"""MCP over lines, those of stdin and stdout or of a socket, with what the SDK's own transport leaves open.

Guarantees:
    - Nothing but protocol lines reaches stdout: `take_stdio` takes both standard descriptors before anything else runs.
    - Every line is answered or obeyed: one that is too long, not UTF-8 or not a message gets an error, under its own id
      where that can be read, and the server goes on.
    - Memory for a line is bounded by `max_request_bytes`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Awaitable, Callable
from typing import Any, BinaryIO, cast

import anyio
import anyio.to_thread
from mcp.server.mcpserver import MCPServer
from mcp.server.stdio import stdio_server
from mcp_types import INVALID_REQUEST, PARSE_ERROR, JSONRPCMessage, jsonrpc_message_adapter
from pydantic import ValidationError

NextLine = Callable[[], Awaitable[bytes]]  # nothing at the end
Write = Callable[[bytes], Awaitable[None]]  # all of it, even if it is cancelled; raises OSError once nobody reads

_ID = re.compile(r'"id"\s*:\s*(-?\d+|"(?:[^"\\]|\\.)*")')


def take_stdio() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for the protocol; from now on prints go to stderr, and reads of stdin find its end.

    Call before anything that may print is imported.
    """
    wire_in, wire_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return wire_in, wire_out


async def serve_stdio(server: MCPServer[Any], wire_in: BinaryIO, wire_out: BinaryIO, max_request_bytes: int) -> None:
    """Serve one client until it closes its end, or our stdout breaks; calls still running then are cancelled."""

    async def write(data: bytes) -> None:
        # Not abandoned on cancel: half a line would spoil every line after it.
        await anyio.to_thread.run_sync(write_all, wire_out, data)

    await serve_lines(server, FileLines(wire_in, max_request_bytes).next, write, max_request_bytes)


async def serve_lines(
    server: MCPServer[Any],
    next_line: NextLine,
    write: Write,
    max_request_bytes: int,
    seen: Callable[[JSONRPCMessage], None] = lambda _: None,
) -> None:
    """Serve one client whose lines come from `next_line` until there are no more, or until `write` fails.

    `seen` is told of every message.
    """
    writer = LineWriter(write)
    reader = LineReader(next_line, writer, max_request_bytes, seen)
    lowlevel = server._lowlevel_server  # MCPServer has no public way to run on given streams (mcp 2.3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.cancel_when_broken, tasks.cancel_scope)
        # The transport asks of its files no more than iteration, write and flush.
        async with stdio_server(cast(Any, reader), cast(Any, writer)) as (read, write_stream):
            await lowlevel.run(read, write_stream, lowlevel.create_initialization_options())
        tasks.cancel_scope.cancel()


class LineWriter:
    """Writes whole lines, one at a time."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._lock = anyio.Lock()
        self._broken = anyio.Event()

    async def write(self, text: str) -> None:
        """Write text that ends with a newline; does nothing once the reader is gone."""
        async with self._lock:
            if not self._broken.is_set():
                try:
                    await self._write(text.encode("utf-8", "replace"))
                except OSError:
                    self._broken.set()

    async def flush(self) -> None:
        """Nothing: `write` leaves nothing behind."""

    async def cancel_when_broken(self, scope: anyio.CancelScope) -> None:
        """Cancel `scope` when the reader is gone: nobody would ever read an answer."""
        await self._broken.wait()
        scope.cancel()


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


class LineReader:
    """Hands over lines that are sound messages; answers the others itself."""

    def __init__(
        self, next_line: NextLine, writer: LineWriter, max_bytes: int, seen: Callable[[JSONRPCMessage], None]
    ) -> None:
        self._next_line, self._writer, self._max_bytes, self._seen = next_line, writer, max_bytes, seen

    def __aiter__(self) -> LineReader:
        """Itself."""
        return self

    async def __anext__(self) -> str:
        """The next sound line."""
        while True:
            line = await self._next_line()
            if not line:
                raise StopAsyncIteration
            if not line.strip():
                continue
            if len(line) > self._max_bytes:
                fault, code = f"The line is longer than {self._max_bytes} bytes; send less.", INVALID_REQUEST
            else:
                try:
                    text = line.decode("utf-8")
                    self._seen(jsonrpc_message_adapter.validate_json(text, by_name=False))
                    return text
                except UnicodeDecodeError as error:
                    fault, code = f"The line is not UTF-8 at byte {error.start}; send JSON as UTF-8.", PARSE_ERROR
                except ValidationError as error:
                    why = error.errors(include_url=False, include_input=False)[0]["msg"]
                    fault, code = f"The line is not a JSON-RPC message: {why}. Send one message per line.", PARSE_ERROR
            await self._writer.write(error_line(request_id(line), code, fault))


class FileLines:
    """Lines of a file, read on a thread; one that is longer than `max_bytes` comes cut.

    The thread is a daemon of its own: a read that nobody ends, which a pool's thread would be joined on, must not hold
    up the process's exit. It reads one line ahead and no more.
    """

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self._lines: asyncio.Queue[bytes] = asyncio.Queue()
        self._taken = threading.Semaphore()
        pump = threading.Thread(target=self._pump, args=(asyncio.get_running_loop(),), name="stdin", daemon=True)
        pump.start()

    async def next(self) -> bytes:
        """The next line; nothing at the end."""
        line = await self._lines.get()
        self._taken.release()
        return line

    def _pump(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand over line after line, and nothing at the end; the rest of one that is too long is dropped."""
        line = b"\n"
        while line:
            self._taken.acquire()
            try:
                line = rest = self._file.readline(self._max_bytes + 1)
                while len(line) > self._max_bytes and rest and not rest.endswith(b"\n"):
                    rest = self._file.readline(self._max_bytes)
            except (OSError, ValueError):  # the descriptor is gone
                line = b""
            try:
                loop.call_soon_threadsafe(self._lines.put_nowait, line)
            except RuntimeError:  # the loop is closed
                return


class StreamLines:
    """Lines of a stream, without a thread; one that is longer than `max_bytes` comes cut."""

    def __init__(self, stream: asyncio.StreamReader, max_bytes: int) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self._buffer = bytearray()

    async def next(self) -> bytes:
        """The next line; nothing at the end, or once the other side is gone."""
        cut, searched = b"", 0
        while True:
            end = self._buffer.find(b"\n", searched) + 1
            if end:
                line = cut or bytes(self._buffer[:end])
                del self._buffer[:end]
                return line
            searched = len(self._buffer)
            if searched > self._max_bytes:  # only its beginning is kept, which tells whose it is
                cut = cut or bytes(self._buffer)
                self._buffer.clear()
                searched = 0
            try:
                data = await self._stream.read(1 << 16)
            except OSError:
                data = b""
            if not data:
                line = cut or bytes(self._buffer)
                self._buffer.clear()
                return line
            self._buffer += data


def request_id(line: bytes) -> int | str | None:
    """The id of a broken request, so that its sender need not wait; None where it cannot be told for sure."""
    text = line[:1_000_000].decode("utf-8", "replace")
    try:
        found = json.loads(text).get("id")
    except (ValueError, AttributeError, RecursionError):
        match = _ID.search(text.partition('"params"')[0])
        found = json.loads(match[1], strict=False) if match else None
    return found if isinstance(found, int | str) and not isinstance(found, bool) else None


def error_line(request_id: int | str | None, code: int, message: str) -> str:
    """A JSON-RPC error as a line."""
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": message}}) + "\n"
