"""Reads lines of a file or a stream as messages. Memory is bounded, and each line is answered or obeyed."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import BinaryIO

import anyio
from mcp_types import (
    INVALID_REQUEST,
    PARSE_ERROR,
    JSONRPCMessage,
    JSONRPCNotification,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

from mlx_mcp.hosting.open_requests import OpenRequests
from mlx_mcp.process.lines import BAD_ID, envelope

NextLine = Callable[[], Awaitable[bytes]]  # nothing at the end
Write = Callable[[bytes], Awaitable[None]]  # writes all, even if it is cancelled; raises OSError once nobody reads

_ID = re.compile(r'"id"\s*:\s*(-?\d+|"(?:[^"\\]|\\.)*")')


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
        """Cancel `scope` when the reader is gone, since nobody would read an answer."""
        await self._broken.wait()
        scope.cancel()


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write all data to an unbuffered file, of which each write may take only a part."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


async def messages(
    next_line: NextLine, writer: LineWriter, max_bytes: int, requests: OpenRequests
) -> AsyncIterator[JSONRPCMessage]:
    """Yield the messages in the lines; answer lines that are none with an error, and count all lines."""
    while line := await next_line():
        requests.num_read += 1
        if not line.strip():
            continue
        try:
            yield message_of(line, max_bytes)
        except BadLine as error:
            await writer.write(error_line(request_id(line), error.code, str(error)))


class BadLine(Exception):
    """A line that is not a valid message. The text says why."""

    def __init__(self, code: int, fault: str) -> None:
        self.code = code
        super().__init__(fault)


def message_of(line: bytes, max_bytes: int) -> JSONRPCMessage:
    """Parse a line as a message.

    Raises:
        BadLine: the line is not a message, or is longer than `max_bytes`.
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
    """Lines of a file, read on a thread. A line that is longer than `max_bytes` is truncated.

    The thread is a daemon, since a read that nobody ends must not delay the process's exit: threads of a pool would be
    joined. It reads one line ahead and no more.
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
        """Pass on line after line, and an empty one at the end. The rest of a line that is too long is dropped."""
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
    """Lines of a stream, without a thread. A line that is longer than `max_bytes` is truncated."""

    def __init__(self, stream: asyncio.StreamReader, max_bytes: int) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self._buffer = bytearray()

    async def next(self) -> bytes:
        """The next line; nothing at the end, or once the other side is gone."""
        truncated, searched = b"", 0
        while True:
            end = self._buffer.find(b"\n", searched) + 1
            if end:
                line = truncated or bytes(self._buffer[:end])
                del self._buffer[:end]
                return line
            searched = len(self._buffer)
            if searched > self._max_bytes:  # only its beginning is kept, which has the id
                truncated = truncated or bytes(self._buffer)
                self._buffer.clear()
                searched = 0
            try:
                data = await self._stream.read(1 << 16)
            except OSError:
                data = b""
            if not data:
                line = truncated or bytes(self._buffer)
                self._buffer.clear()
                return line
            self._buffer += data


def request_id(line: bytes) -> int | str | None:
    """The id of an invalid request, so that its sender gets an answer; None if it is not certain."""
    text, found = line[:1_000_000].decode("utf-8", "replace"), None
    try:
        found = json.loads(text).get("id")
    except (ValueError, AttributeError, RecursionError):
        match = _ID.search(text.partition('"params"')[0])
        with suppress(ValueError):  # it has a broken escape, or thousands of digits
            found = json.loads(match[1], strict=False) if match else None
    return found if isinstance(found, int | str) and not isinstance(found, bool) else None


def error_line(request_id: int | str | None, code: int, message: str) -> str:
    """A JSON-RPC error as a line."""
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": message}}) + "\n"
