"""What comes and goes at /mcp, where the SDK's transport leaves something open.

Guarantees:
    - A body is counted as it comes; one of more than `max_bytes` is refused with 413 before the rest is read.
    - A body that is no sound JSON-RPC message is answered with a JSON-RPC error and status 400, under its own id if
      that is one. (The SDK takes a request whose id is null or true for a notification, and never answers it.)
    - Who accepts JSON or events only is not refused; who accepts JSON only gets JSON.
"""

from __future__ import annotations

import json
from typing import Any

from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, INVALID_REQUEST, PARSE_ERROR
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

JSON, EVENTS = "application/json", "text/event-stream"


class Messages:
    """Hands sound messages to the SDK's app, and answers the others itself."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or have the app answer."""
        headers = MutableHeaders(raw=list(scope["headers"]))
        accepted = ", ".join(headers.getlist("accept"))
        has_json, has_events = accepts(accepted, JSON), accepts(accepted, EVENTS)
        if has_json or has_events or not accepted:
            headers["accept"] = f"{JSON}, {EVENTS}"
        scope = {**scope, "headers": headers.raw}
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(headers, receive)
        except ValueError:
            told = f"The body is longer than {self._max_bytes} bytes; send less."
            await PlainTextResponse(told, 413)(scope, receive, send)
            return
        if body is None:  # the client is gone
            return
        fault = fault_of(body)
        if fault is not None:
            await Response(json.dumps(fault), 400, media_type=JSON)(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, JsonOnly(send).send if has_json and not has_events else send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None if the client goes away before its end.

        Raises:
            ValueError: it is too long, or will be.
        """
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise ValueError("too long")
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                raise ValueError("too long")
        return bytes(body)


def accepts(accepted: str, media_type: str) -> bool:
    """Whether an Accept header has a type, or a wildcard for it."""
    types = {part.partition(";")[0].strip().lower() for part in accepted.split(",")}
    return not types.isdisjoint((media_type, f"{media_type.partition('/')[0]}/*", "*/*"))


def fault_of(body: bytes) -> dict[str, Any] | None:
    """The answer to a body that is no sound JSON-RPC message; None if it is one."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        return failure(None, PARSE_ERROR, f"The body is not JSON: {error}. Send one JSON-RPC message.")
    if not isinstance(message, dict):
        return failure(None, INVALID_REQUEST, "The body must be one JSON-RPC message, which is an object; no batch.")
    id_ = message.get("id")
    method = message.get("method")
    # What could not be read had no id, and some clients give notifications a null.
    may_be_null = ("error" in message and method is None) or str(method).startswith("notifications/")
    is_id = (isinstance(id_, int | str) and not isinstance(id_, bool)) or (id_ is None and may_be_null)
    if "id" in message and not is_id:
        return failure(
            None, INVALID_REQUEST, f"The id of a request must be a string or an integer, not {json.dumps(id_):.80}."
        )
    if message.get("jsonrpc") != "2.0":
        return failure(id_, INVALID_REQUEST, 'A JSON-RPC message must have "jsonrpc": "2.0".')
    if "method" in message and not isinstance(message["method"], str):
        return failure(id_, INVALID_REQUEST, "The method of a request must be a string.")
    if "method" not in message and not message.keys() & {"result", "error"}:
        return failure(id_, INVALID_REQUEST, "The request has no method; send one, or a result or error.")
    if not isinstance(message.get("params") or {}, dict):
        return failure(id_, INVALID_PARAMS, "The params of a request must be an object.")
    return None


def failure(id_: int | str | None, code: int, text: str) -> dict[str, Any]:
    """A JSON-RPC error."""
    return {"jsonrpc": "2.0", "id": id_, "error": {"code": code, "message": text}}


class JsonOnly:
    """Sends the last of a response's events, which is the answer, as JSON; what is JSON already is sent as it is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None  # of a stream of events
        self._rest = b""  # the event that has not ended
        self._data = b""  # of the last event that had any

    async def send(self, message: Message) -> None:
        """See the ASGI specification."""
        starts = message["type"] == "http.response.start"
        if starts and Headers(raw=message["headers"]).get("content-type", "").startswith(EVENTS):
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._take(message.get("body", b""))
            if not message.get("more_body", False):
                await self._answer(self._start)

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._data = line.removeprefix(b"data:").strip()

    async def _answer(self, start: Message) -> None:
        none = failure(None, INTERNAL_ERROR, "The call ended without an answer. Call again.")
        body = self._data or json.dumps(none).encode()
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-type"], headers["content-length"] = JSON, str(len(body))
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
