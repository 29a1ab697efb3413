"""Answers that come as a stream of events, for every API.

A token goes through here at every step of every stream, so that nothing is done for it but to write it: one task beside
the request's own looks whether the client is still there, and sends a comment now and then. A client that does not
read is cut off by its connection (`api/http/arrival.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING_S = 15.0  # a comment so often keeps proxies and clients from taking a silent stream for dead
PING = b": ping\n\n"
HEADERS = {"cache-control": "no-store", "connection": "keep-alive", "x-accel-buffering": "no"}


def encoded(data: str, name: str = "") -> bytes:
    """An event, as it is sent; the data is one line."""
    return (f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n").encode()


async def stream(events: AsyncGenerator[bytes]) -> Response:
    """A response of these events, each as it is sent; what comes together may be yielded as one.

    The first is awaited before: until then an error has a status of its own.
    """
    return EventStream(await anext(events), events)


class EventStream(Response):
    """Sends events as they come, until they end, fail, or the client leaves; then they are closed."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes]) -> None:
        """`first` is sent before `events`."""
        self.status_code, self.background = 200, None
        self.init_headers(HEADERS)
        self._first, self._events = first, events
        self._writes = True  # whether no comment may be sent now: before the head, while something is sent, at the end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        async with aclosing(self._events):
            with anyio.CancelScope() as connected:  # not a task group, which would wrap errors in groups
                watching = asyncio.create_task(self._watch(receive, send, connected))
                try:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await self._write(send, self._first)
                    async for event in self._events:
                        await self._write(send, event)
                    self._writes = True
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                finally:
                    watching.cancel()

    async def _write(self, send: Send, data: bytes) -> None:
        self._writes = True
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._writes = False

    async def _watch(self, receive: Receive, send: Send, connected: anyio.CancelScope) -> None:
        """Cancel the sending once the client has left; send comments until then."""
        while True:
            try:
                async with asyncio.timeout(PING_S):
                    while (await receive())["type"] != "http.disconnect":
                        pass
                connected.cancel()
                return
            except TimeoutError:
                if not self._writes:
                    await send({"type": "http.response.body", "body": PING, "more_body": True})
