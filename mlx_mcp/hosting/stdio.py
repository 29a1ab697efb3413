"""MCP over lines, those of stdin and stdout or of a socket, with what the SDK's own transport leaves open.

Guarantees:
    - Nothing but protocol lines reaches stdout: `take_stdio` takes both standard descriptors before anything else runs.
    - Every line is answered or obeyed: one that is too long, not UTF-8 or not a message gets an error, under its own id
      where that can be read, and the server goes on.
    - Memory for a line is bounded by `max_request_bytes`.
    - `OpenRequests` says at any time which requests were read and are not answered on the wire: a server that waits
      until there are none loses no answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, BinaryIO

import anyio
import anyio.to_thread
from mcp.server.mcpserver import MCPServer
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp_types import (
    INVALID_REQUEST,
    PARSE_ERROR,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

from mlx_mcp.process.lines import BAD_ID, LISTENING, envelope

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


class OpenRequests:
    """One client's requests that were read and are not answered on the wire; those that only listen do not count.

    One event loop touches it.
    """

    def __init__(self) -> None:
        self.num_read = 0  # lines
        self.returned: list[RequestId] = []  # read after `return_others`, and not taken up
        self.returning = False
        self._open: Counter[RequestId] = Counter()

    @property
    def waiting(self) -> bool:
        """Whether the client waits for an answer."""
        return self._open.total() > 0

    def return_others(self) -> None:
        """From now on take up no request: the client has another server do it."""
        self.returning = True

    def take(self, request: JSONRPCRequest) -> bool:
        """Note a request that was read; whether it is to be taken up."""
        if self.returning:
            self.returned.append(request.id)
        elif request.method not in LISTENING:
            self._open[request.id] += 1
        return not self.returning

    def settle(self, id_: RequestId) -> None:
        """Note that the request was answered, or was cancelled and will not be."""
        if self._open[id_] > 1:
            self._open[id_] -= 1
        else:
            del self._open[id_]


async def serve_stdio(
    server: MCPServer[Any], wire_in: BinaryIO, wire_out: BinaryIO, max_request_bytes: int, requests: OpenRequests
) -> None:
    """Serve one client until it closes its end, or our stdout breaks; calls still running then are cancelled."""

    async def write(data: bytes) -> None:
        # Not abandoned on cancel: half a line would spoil every line after it.
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

    `requests` is kept true all the while, and `seen` is told of every message.
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
    """What the SDK calls for a request that it leaves unanswered."""
    requests.settle(id_)


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

    async def cancel_when_broken(self, scope: anyio.CancelScope) -> None:
        """Cancel `scope` when the reader is gone: nobody would ever read an answer."""
        await self._broken.wait()
        scope.cancel()


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


async def messages(
    next_line: NextLine, writer: LineWriter, max_bytes: int, requests: OpenRequests
) -> AsyncIterator[JSONRPCMessage]:
    """Yield what is sound of the lines; answer the others, and count all."""
    while line := await next_line():
        requests.num_read += 1
        if not line.strip():
            continue
        try:
            yield message_of(line, max_bytes)
        except BadLine as error:
            await writer.write(error_line(request_id(line), error.code, str(error)))


class BadLine(Exception):
    """A line that is no sound message; the text says why."""

    def __init__(self, code: int, fault: str) -> None:
        self.code = code
        super().__init__(fault)


def message_of(line: bytes, max_bytes: int) -> JSONRPCMessage:
    """The message that a line is.

    Raises:
        BadLine: it is none, or longer than `max_bytes`.
    """
    if len(line) > max_bytes:
        raise BadLine(INVALID_REQUEST, f"The line is longer than {max_bytes} bytes; send less.")
    try:
        text = line.decode("utf-8")
        message = jsonrpc_message_adapter.validate_json(text, by_name=False)
    except UnicodeDecodeError as error:
        fault = f"The line is not UTF-8 at byte {error.start}; send JSON as UTF-8."
        raise BadLine(PARSE_ERROR, fault) from error
    except ValidationError as error:
        why = error.errors(include_url=False, include_input=False)[0]["msg"]
        fault = f"The line is not a JSON-RPC message: {why}. Send one message per line."
        raise BadLine(PARSE_ERROR, fault) from error
    # The SDK takes a request whose id is neither a string nor an integer for a notification, and would not answer.
    if isinstance(message, JSONRPCNotification) and envelope(line).bad_request:
        raise BadLine(INVALID_REQUEST, BAD_ID)
    return message


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
