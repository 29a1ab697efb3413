"""Answers that come as a stream of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

PING_S = 15  # a comment so often keeps proxies and clients from taking a silent stream for dead
STALL_S = 30  # a client that reads nothing for so long is cut off


async def stream(events: AsyncGenerator[ServerSentEvent | bytes]) -> Response:
    """A response of these events; bytes are events that are encoded already.

    The first is awaited before: until then an error has a status of its own.
    """
    first = await anext(events)

    async def all_of_them() -> AsyncGenerator[ServerSentEvent | bytes]:
        try:
            yield first
            async for event in events:
                yield event
        finally:
            await events.aclose()

    return EventSourceResponse(all_of_them(), ping=PING_S, send_timeout=STALL_S, sep="\n")
