"""Every HTTP request as those see it who watch the server: counted by route and status, and traced."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mcp.service.service import Service
from mlx_mcp.service.tracing import parent_of, request_span, trace_generations

METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
OTHER = "other"
UNANSWERED = "none"  # the status of a request whose client left before the answer began
TRACE_KEY = "mlx_mcp.trace"  # where the scope has the request's span, for what answers it on another task


class Observed:
    """Has an app answer, and notes the request. It goes around everything else, so that refusals are seen too."""

    def __init__(self, app: ASGIApp, service: Service, routes: Sequence[BaseRoute]) -> None:
        self._app, self._observer, self._routes = app, service.observer, routes
        trace_generations(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and count."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), UNANSWERED

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        method = scope["method"] if scope["method"] in METHODS else OTHER
        route = self._route(scope)
        try:
            # What is only looked at is not traced: probes would hide the rest, and a GET of MCP lasts for hours.
            if method in ("POST", "PUT", "PATCH", "DELETE"):
                with request_span(f"{method} {route}", parent_of(Headers(scope=scope))) as span:
                    if span is not None:
                        scope[TRACE_KEY] = span
                    try:
                        await self._app(scope, receive, note)
                    finally:
                        if span is not None:
                            span.name(f"{method} {route}", http__request__method=method, http__route=route)
                            if status.isdigit():
                                span.span.set_attribute("http.response.status_code", int(status))
                            if status[0] == "5":
                                span.note_error(status)
            else:
                await self._app(scope, receive, note)
        finally:
            self._observer.requests.add(route, method, status, seconds=time.monotonic() - began)

    def _route(self, scope: Scope) -> str:
        """The route that a request is for, in the words of the app; never the path that the caller wrote."""
        for route in self._routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return route.path
        return OTHER
