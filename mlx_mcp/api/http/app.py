"""MCP over streamable HTTP at /mcp, /health and /metrics, and the routes of others: how the app is put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Scope

from mlx_mcp.api.http.auth import Auth, Refuse, Tokens
from mlx_mcp.api.http.gate import Gate
from mlx_mcp.api.http.health import health_routes
from mlx_mcp.api.http.messages import Messages
from mlx_mcp.api.http.metrics import metrics_route
from mlx_mcp.api.http.observed import Observed
from mlx_mcp.api.http.paced import Paced
from mlx_mcp.config import Config
from mlx_mcp.service.service import Service

# Paths that need no token: they say nothing but that the process lives, or how to get in.
OPEN_PATHS = ("/health/live", "/")


def http_app(
    server: MCPServer[Any],
    service: Service,
    config: Config,
    routes: Sequence[BaseRoute] = (),
    tokens: Tokens | None = None,
    refuse: Refuse | None = None,
) -> ASGIApp:
    """The ASGI app of a server, with the routes of other APIs.

    Every request passes the gate, and then has to have one of the tokens, if there are any. `refuse` makes the answer
    to one that is turned away before it reaches its API.
    """
    app = server.streamable_http_app(
        host=config.host,
        max_request_body_size=config.max_request_bytes,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),  # the gate does more
    )
    app.router.routes.extend([*health_routes(service), metrics_route(service), *routes])
    sessions: Any = server.session_manager
    sessions.asgi_app = Messages(sessions.asgi_app, config.max_request_bytes)
    known: ASGIApp = app
    if tokens is not None:
        how_to_get_in = [urlsplit(tokens.metadata_url).path] if tokens.metadata_url else []
        known = Auth(Paced(app, service.limits), tokens, refuse or plain, [*OPEN_PATHS, *how_to_get_in])
    return Observed(Gate(known, config), service, app.router.routes)


def plain(scope: Scope, status: int, told: str) -> Response:
    """The answer to a request that is for none of the APIs with a form of its own."""
    return JSONResponse({"error": told}, status)
