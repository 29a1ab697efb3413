"""Endpoints: a path, the shapes that go in and come out, and what is done between.

An API is a list of these and the form of its errors. Everything else of a request is the same for all and is done
here: its body is read and checked, its caller found, its row freed when the client leaves, and errors are answered.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mlx_mcp.api.web.failure import Failure, failure_of
from mlx_mcp.errors import MlxMcpError
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service


@dataclass(frozen=True)
class Serving:
    """What endpoints work with."""

    service: Service
    activity: Activity
    files: FileReader


@dataclass(frozen=True)
class Asked:
    """One request: who asks, what the path and the headers say, and the body in its shape."""

    serving: Serving
    caller: Caller
    request: Request
    body: Any = None

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


@dataclass(frozen=True)
class Api:
    """The endpoints of one protocol, and how it says that something went wrong."""

    name: str
    endpoints: tuple[Endpoint, ...]
    refuse: Callable[[Failure], Response]


def routes_of(api: Api, serving: Serving) -> list[Route]:
    """The routes of an API."""
    return [
        Route(each.path, Answering(api, each, serving), methods=[each.method], name=f"{api.name} {each.path}")
        for each in api.endpoints
    ]


class Answering:
    """Answers the requests to one endpoint, as an ASGI app."""

    def __init__(self, api: Api, endpoint: Endpoint, serving: Serving) -> None:
        self._api, self._endpoint, self._serving = api, endpoint, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        request = Request(scope, receive)
        try:
            body = await self._body(request)
            caller = Caller(scope.get("state", {}).get("tenant", ""), self._serving.activity, self._serving.files)
            with self._serving.activity.under_way():
                response = await self._response(Asked(self._serving, caller, request, body))
                if response is not None:
                    await response(scope, receive, send)
            return
        except ClientDisconnect:
            return
        except ValidationError as error:
            failure = failure_of_shape(error)
        except ValueError as error:
            failure = Failure(400, str(error))
        except MlxMcpError as error:
            self._serving.service.observer.failed(error)
            failure = failure_of(error)
        await self._api.refuse(failure)(scope, receive, send)

    async def _body(self, request: Request) -> BaseModel | None:
        if self._endpoint.takes is None:
            return None
        try:
            given = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The body is not JSON: {error}. Send one JSON object.") from error
        return self._endpoint.takes.model_validate(given)

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
                made = await self._endpoint.handle(asked)
            finally:
                watching.cancel()
        if made is None or isinstance(made, Response):
            return made
        return JSONResponse(made.model_dump(mode="json", exclude_none=True), self._endpoint.status)


def failure_of_shape(error: ValidationError) -> Failure:
    """The failure of a body that does not have the shape that is asked for; nothing of the body is repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return Failure(400, f"{where or 'The body'}: {first['msg']}. See /openapi.json for what may be sent.", None, where)
