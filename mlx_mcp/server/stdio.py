"""MCP over stdin and stdout, with what the SDK's own transport leaves open.

Guarantees:
    - Nothing but protocol lines reaches stdout: both standard descriptors are taken away before anything else runs.
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
from typing import Any, BinaryIO, cast

import anyio
import anyio.to_thread
from mcp.server.mcpserver import MCPServer
from mcp.server.stdio import stdio_server
from mcp_types import INVALID_REQUEST, PARSE_ERROR, jsonrpc_message_adapter
from pydantic import ValidationError

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
    writer = LineWriter(wire_out)
    reader = LineReader(wire_in, writer, max_request_bytes)
    lowlevel = server._lowlevel_server  # MCPServer has no public way to run on given streams (mcp 2.3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.cancel_when_broken, tasks.cancel_scope)
        # The transport asks of its files no more than iteration, write and flush.
        async with stdio_server(cast(Any, reader), cast(Any, writer)) as (read, write):
            await lowlevel.run(read, write, lowlevel.create_initialization_options())
        tasks.cancel_scope.cancel()


class LineWriter:
    """Writes whole lines, one at a time, on a thread."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = anyio.Lock()
        self._broken = anyio.Event()

    async def write(self, text: str) -> None:
        """Write text that ends with a newline; does nothing once the reader is gone."""
        async with self._lock:
            if not self._broken.is_set():
                try:
                    # Not abandoned on cancel: half a line would spoil every line after it.
                    await anyio.to_thread.run_sync(self._write_all, text.encode("utf-8", "replace"))
                except OSError:
                    self._broken.set()

    async def flush(self) -> None:
        """Nothing: `write` leaves nothing behind."""

    async def cancel_when_broken(self, scope: anyio.CancelScope) -> None:
        """Cancel `scope` when the reader is gone: nobody would ever read an answer."""
        await self._broken.wait()
        scope.cancel()

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) or 0 :]


class LineReader:
    """Reads lines that are sound messages; answers the others itself.

    The reading thread is a daemon of its own: a read that nobody ends, which a pool's thread would be joined on, must
    not hold up the process's exit. It reads one line ahead and no more.
    """

    def __init__(self, file: BinaryIO, writer: LineWriter, max_bytes: int) -> None:
        self._file, self._writer, self._max_bytes = file, writer, max_bytes
        self._lines: asyncio.Queue[bytes] = asyncio.Queue()
        self._taken = threading.Semaphore()
        pump = threading.Thread(target=self._pump, args=(asyncio.get_running_loop(),), name="stdin", daemon=True)
        pump.start()

    def __aiter__(self) -> LineReader:
        """Itself."""
        return self

    async def __anext__(self) -> str:
        """The next sound line."""
        while True:
            line = await self._lines.get()
            self._taken.release()
            if not line:
                raise StopAsyncIteration
            if not line.strip():
                continue
            if len(line) > self._max_bytes:
                fault, code = f"The line is longer than {self._max_bytes} bytes; send less.", INVALID_REQUEST
            else:
                try:
                    text = line.decode("utf-8")
                    jsonrpc_message_adapter.validate_json(text, by_name=False)
                    return text
                except UnicodeDecodeError as error:
                    fault, code = f"The line is not UTF-8 at byte {error.start}; send JSON as UTF-8.", PARSE_ERROR
                except ValidationError as error:
                    why = error.errors(include_url=False, include_input=False)[0]["msg"]
                    fault, code = f"The line is not a JSON-RPC message: {why}. Send one message per line.", PARSE_ERROR
            await self._writer.write(error_line(request_id(line), code, fault))

    def _pump(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand over line after line, and nothing at the end; a line that is too long comes cut, its rest is dropped."""
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
