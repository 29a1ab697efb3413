"""The APIs that are served over HTTP, put together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mcp.server.auth.routes import create_protected_resource_routes
from pydantic import AnyHttpUrl
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Scope

from mlx_mcp import __version__
from mlx_mcp.api.anthropic import api as anthropic
from mlx_mcp.api.http.app import http_app, plain
from mlx_mcp.api.http.auth import Refuse
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.api.openai.api import OPENAI
from mlx_mcp.api.page.page import page_routes
from mlx_mcp.api.sessions.endpoints import SESSIONS
from mlx_mcp.api.web.endpoint import Answering, Api, Serving, routes_of
from mlx_mcp.api.web.failure import Failure
from mlx_mcp.api.web.openapi import openapi
from mlx_mcp.config import Config
from mlx_mcp.hosting.access import access_of
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

APIS: tuple[Api, ...] = (OPENAI, anthropic.API, SESSIONS)


def web_app(
    service: Service,
    activity: Activity,
    config: Config,
    apis: Sequence[Api] | None = None,
    sandboxes: Sandboxes | None = None,
) -> ASGIApp:
    """All that is served over HTTP: MCP, and each of the other APIs. The `sandboxes` are those of the process.

    Raises:
        ConfigError: others are to be served, and nobody could get in.
    """
    apis = APIS if apis is None else apis
    files = FileReader(config.file_roots or (), *config.file_limits)
    mcp = build_server(service, files, activity, config.wait_s, sandboxes=sandboxes)
    serving = Serving(service, activity, files, config.max_request_bytes)
    routes, access = routes_of(apis, serving), access_of(config)
    described = Route("/openapi.json", showing(apis))
    others = [*page_routes(service), described, *metadata_routes(config)]
    return http_app(mcp, service, config, [*routes, *others], access, refusing(routes))


def document(apis: Sequence[Api] = APIS) -> dict[str, Any]:
    """The OpenAPI document of APIs."""
    return openapi(tuple(apis), __version__)


def showing(apis: Sequence[Api]) -> Callable[[Request], Awaitable[Response]]:
    """What answers with the document, which is made for the first who asks."""
    made: list[Response] = []

    async def show(request: Request) -> Response:
        if not made:
            made.append(JSONResponse(document(apis)))
        return made[0]

    return show


def metadata_routes(config: Config) -> list[Route]:
    """What tells clients which authorization server issues tokens for this one; nothing if none does."""
    if config.oauth_issuer is None or config.oauth_audience is None:
        return []
    issuer, audience = AnyHttpUrl(config.oauth_issuer), AnyHttpUrl(config.oauth_audience)
    return create_protected_resource_routes(audience, [issuer], list(config.oauth_scopes) or None, "mlx-mcp")


def refusing(routes: Sequence[Route]) -> Refuse:
    """What turns a request away in the form of the API that its path belongs to."""

    def refuse(scope: Scope, status: int, told: str) -> Response:
        route = next((route for route in routes if route.matches(scope)[0] is not Match.NONE), None)
        found = None if route is None else route.app
        return found.api.refuse(Failure(status, told)) if isinstance(found, Answering) else plain(scope, status, told)

    return refuse
