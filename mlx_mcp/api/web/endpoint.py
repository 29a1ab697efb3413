"""Endpoints: a path, the shapes that go in and come out, and what is done between.

An API is a list of these and the form of its errors. Everything else of a request is the same for all and is done
here: its body is read and checked, its caller found, its row freed when the client leaves, and errors are answered.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

from mlx_mcp.api.web.failure import Failure, failure_of
from mlx_mcp.errors import MlxMcpError
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from mlx_mcp.service.values import called


@dataclass(frozen=True)
class Serving:
    """What endpoints work with."""

    service: Service
    activity: Activity
    files: FileReader
    max_request_bytes: int = 4 << 20  # the longest body


@dataclass(frozen=True)
class Asked:
    """One request: who asks, what the path says, and body, query and headers in their shapes."""

    serving: Serving
    caller: Caller
    request: Request
    body: Any = None
    query: Any = None
    headers: Any = None

    @property
    def service(self) -> Service:
        """The service that answers."""
        return self.serving.service


# An answer in its shape, or a response that is one already, such as a stream of events.
Handle = Callable[[Asked], Awaitable[BaseModel | Response]]


@dataclass(frozen=True)
class Endpoint:
    """One operation of an API; the shapes are what the OpenAPI document says of it."""

    method: str
    path: str
    handle: Handle
    summary: str
    takes: type[BaseModel] | None = None
    gives: type[BaseModel] | None = None
    events: type[BaseModel] | None = None  # the data of an event, where the answer can come as a stream
    status: int = 200
    last_data: str = ""  # of the last event, where that is no JSON
    when: str = ""  # a header that a request must have; those without it go to another endpoint of the same path
    query: type[BaseModel] | None = None  # what the address may say after its question mark
    headers: type[BaseModel] | None = None  # headers that mean something here, by their names as aliases
    path_words: Mapping[str, str] = field(default_factory=dict)  # what the parts in braces of the path are
    also: Mapping[int, type[BaseModel]] = field(default_factory=dict)  # answers with another status than `status`

    @property
    def needs_body(self) -> bool:
        """Whether a call without a body is refused."""
        return self.takes is not None and any(each.is_required() for each in self.takes.model_fields.values())


@dataclass(frozen=True)
class Api:
    """The endpoints of one protocol, and how it says that something went wrong."""

    name: str
    endpoints: tuple[Endpoint, ...]
    refuse: Callable[[Failure], Response]
    error: type[BaseModel]  # the shape of what `refuse` says


def routes_of(apis: Sequence[Api], serving: Serving) -> list[Route]:
    """The routes of some APIs; those that only requests with a certain header take come first."""
    ways = [(api, each) for api in apis for each in api.endpoints]
    return [
        RouteWhen(each.path, Answering(api, each, serving), methods=[each.method], name=f"{api.name} {each.path}")
        for api, each in sorted(ways, key=lambda way: not way[1].when)
    ]


class RouteWhen(Route):
    """A route that a request takes only if it has the header that the route's endpoint names."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See Route."""
        assert isinstance(self.app, Answering)
        when = self.app.endpoint.when
        return (Match.NONE, {}) if when and when not in Headers(scope=scope) else super().matches(scope)


class Answering:
    """Answers the requests to one endpoint, as an ASGI app."""

    def __init__(self, api: Api, endpoint: Endpoint, serving: Serving) -> None:
        self._api, self.endpoint, self._serving = api, endpoint, serving

    @property
    def api(self) -> Api:
        """The API that the endpoint belongs to."""
        return self._api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        request, sent = Request(scope, receive), Sent(send)
        try:
            body = await self._body(request)
            query, headers = self._parsed(self.endpoint.query, dict(request.query_params)), self._headers(request)
            caller = self._caller(request)
            with self._serving.activity.under_way():
                response = await self._response(Asked(self._serving, caller, request, body, query, headers))
                if response is not None:
                    await response(scope, receive, sent)
            return
        except ClientDisconnect:
            return
        except TooLong as error:
            failure = Failure(413, str(error))
        except ValidationError as error:
            failure = failure_of_shape(error)
        except ValueError as error:
            failure = Failure(400, str(error))
        except MlxMcpError as error:
            self._serving.service.observer.failed(error)
            failure = failure_of(error)
        refusal = self._api.refuse(failure)
        await (sent.end_with(refusal) if sent.begun else refusal(scope, receive, send))

    def _caller(self, request: Request) -> Caller:
        """On whose behalf it is. The client is called by the API, and by the first word of its User-Agent."""
        tenant: str = request.scope.get("state", {}).get("tenant", "")
        agent = request.headers.get("user-agent", "").partition(" ")[0]
        return Caller(tenant, self._serving.activity, self._serving.files, called(f"{self._api.name} API", agent))

    async def _body(self, request: Request) -> BaseModel | None:
        body = await self._whole_body(request)
        if self.endpoint.takes is None:
            return None
        try:
            given = {} if not (body or self.endpoint.needs_body) else json.loads(body)
            if b"\\ud" in body.lower():  # half a character, which no text may have, is found where it is written
                json.dumps(given, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The body is not JSON: {error}. Send one JSON object.") from error
        return self.endpoint.takes.model_validate(given)

    def _headers(self, request: Request) -> BaseModel | None:
        shape = self.endpoint.headers
        names = [str(each.alias) for each in shape.model_fields.values()] if shape else []
        return self._parsed(shape, {name: request.headers[name] for name in names if name in request.headers})

    @staticmethod
    def _parsed(shape: type[BaseModel] | None, given: Mapping[str, str]) -> BaseModel | None:
        return None if shape is None else shape.model_validate(given)

    async def _whole_body(self, request: Request) -> bytes:
        """The body, which is counted as it comes.

        Raises:
            TooLong: it is longer than a body may be, or says that it will be.
            ClientDisconnect: the client went away before its end.
        """
        limit, declared = self._serving.max_request_bytes, request.headers.get("content-length", "")
        body = bytearray()
        if not (declared.isdigit() and int(declared) > limit):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    break
            else:
                return bytes(body)
        raise TooLong(f"The body is longer than the {limit} bytes that one may have. Send less at once.")

    async def _response(self, asked: Asked) -> Response | None:
        """The response; None if the client left before it was there, which frees its row."""
        made: BaseModel | Response | None = None
        with anyio.CancelScope() as scope:  # not a task group, which would wrap errors in groups

            async def watch() -> None:
                while (await asked.request.receive())["type"] != "http.disconnect":
                    pass
                scope.cancel()

            watching = asyncio.create_task(watch())
            try:
                made = await self.endpoint.handle(asked)
            finally:
                watching.cancel()
        if made is None or isinstance(made, Response):
            return made
        return answer(made, self.endpoint.status)


def answer(made: BaseModel, status: int = 200) -> Response:
    """A shape as a response; what is not there is left out."""
    return JSONResponse(made.model_dump(mode="json", by_alias=True, exclude_none=True), status)


class TooLong(Exception):
    """A body is longer than one may be."""


def failure_of_shape(error: ValidationError) -> Failure:
    """The failure of a body that does not have the shape that is asked for; nothing of the body is repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return Failure(400, f"{where or 'The body'}: {first['msg']}. See /openapi.json for what may be sent.", None, where)


class Sent:
    """Sends a response on, and knows how far it is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.ended = False

    async def __call__(self, message: Message) -> None:
        """Send a message."""
        self.begun = True
        self.ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    async def end_with(self, refusal: Response) -> None:
        """End a stream of events that was cut off by one that says why; all APIs name it "error"."""
        if not self.ended:
            body = b"event: error\ndata: " + bytes(refusal.body) + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
