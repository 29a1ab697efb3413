"""How long a request may take to arrive over HTTP, and its answer to be read: uvicorn waits for ever.

Knows nothing of what is asked for.

Guarantees:
    - A request's head is there within HEAD_S of its first byte, or of the connection; all of it within `timeout_s`.
      Else it is answered with 408, unless it was answered already, and the connection ends.
    - Of a body that comes after the answer to it nothing is kept: the connection ends within LINGER_S. Were it closed
      at once, the system would tell the client that, and take back the answer.
    - Once a request is there its answer may take as long as it likes.
    - A client that leaves unread what was sent to it for STALL_S, more than buffers hold, is cut off; so is one that
      has not read the last of it STALL_S after the connection was to end. What was computed for it is given up.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
STALL_S = 30.0
LINGER_S = 1.0
TOLD = b"The request did not arrive in time. Send it again."
LATE = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(TOLD), TOLD)
)


class TimedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, timeout_s: float, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._timeout_s = timeout_s
        self._began: float | None = None  # since when a request is on its way
        self._due: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None  # when it will have read too little for too long
        self._ends: asyncio.TimerHandle | None = None  # when the connection ends, whatever is unread
        self._deaf = False  # what still comes is thrown away

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # narrowed by uvicorn
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._watch(arriving=True)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if not self._deaf:
            super().data_received(data)
            self._look()

    def on_response_complete(self) -> None:
        """Called by uvicorn once an answer was sent; the next request may have begun already."""
        unread = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if unread:
            self._hang_up()
        elif self.transport.is_closing():
            self._close()
        else:
            self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._watch(arriving=False)
        self._read_on()
        if self._ends is not None:
            self._ends.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Called by asyncio while the client leaves more unread than is kept for it."""
        super().pause_writing()
        self._read_on()
        self._stalled = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Called by asyncio once the client has read most of that."""
        self._read_on()
        super().resume_writing()

    def _read_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _hang_up(self) -> None:
        """End the connection, and throw away what still comes by it."""
        self._deaf = True
        self._watch(arriving=False)
        if self.transport.is_closing() or not self.transport.can_write_eof():
            self._close()
        else:
            self.transport.write_eof()
            self.transport.resume_reading()
            self._end_within(LINGER_S)

    def _close(self) -> None:
        """End the connection once the client has read what was sent, and then at the latest."""
        self.transport.close()
        self._end_within(STALL_S)

    def _end_within(self, seconds: float) -> None:
        if self._ends is None:
            self._ends = self.loop.call_later(seconds, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Called by uvicorn when no further request has come."""
        super().timeout_keep_alive_handler()
        if self.transport.is_closing():
            self._close()

    def _look(self) -> None:
        state = self.conn.their_state
        begun = state is h11.IDLE and bool(self.conn.trailing_data[0])
        self._watch(arriving=(begun or state is h11.SEND_BODY) and not self.transport.is_closing())

    def _watch(self, arriving: bool) -> None:
        """Have the request that is on its way be there in time, if there is one."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if not arriving:
            self._began = None
            return
        if self._began is None:
            self._began = self.loop.time()
        limit_s = self._timeout_s if self.conn.their_state is h11.SEND_BODY else min(HEAD_S, self._timeout_s)
        self._due = self.loop.call_at(self._began + limit_s, self._end)

    def _end(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if begun and not (answering and self.cycle.response_started):
            self.transport.write(LATE)
        if answering:  # from now on the app sends to nobody
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._hang_up()
