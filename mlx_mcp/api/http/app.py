"""MCP over streamable HTTP at /mcp, /health and /metrics, and the routes of others: how the app is put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from mlx_mcp.api.http.gate import Gate
from mlx_mcp.api.http.health import health_routes
from mlx_mcp.api.http.messages import Messages
from mlx_mcp.api.http.metrics import metrics_route
from mlx_mcp.api.http.observed import Observed
from mlx_mcp.config import Config
from mlx_mcp.service.service import Service


def http_app(server: MCPServer[Any], service: Service, config: Config, routes: Sequence[BaseRoute] = ()) -> ASGIApp:
    """The ASGI app of a server, with the routes of other APIs.

    Every request passes the gate, those for /mcp the token, if there is one, and then what is said of messages.
    """
    app = server.streamable_http_app(
        host=config.host,
        max_request_body_size=config.max_request_bytes,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),  # the gate does more
    )
    app.router.routes.extend([*health_routes(service), metrics_route(service), *routes])
    sessions: Any = server.session_manager
    sessions.asgi_app = Messages(sessions.asgi_app, config.max_request_bytes)
    return Observed(Gate(app, config), service, app.router.routes)
