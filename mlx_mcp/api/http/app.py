"""MCP over streamable HTTP at /mcp, and /health: how the app is put together."""

from __future__ import annotations

from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from mlx_mcp.api.http.gate import Gate
from mlx_mcp.api.http.messages import Messages
from mlx_mcp.config import Config
from mlx_mcp.engine.client import EngineClient


def http_app(server: MCPServer[Any], client: EngineClient, config: Config) -> ASGIApp:
    """The ASGI app of a server.

    Every request passes the gate, those for /mcp the token, if there is one, and then what is said of messages.
    """

    async def health(request: Request) -> JSONResponse:
        stats = client.stats
        body = {
            "running": stats.running,
            "waiting": stats.waiting,
            "rows": stats.rows,
            "kv_bytes": stats.kv_bytes,
            "cache_bytes": stats.cache_bytes,
            "sessions": stats.sessions,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "preemptions": stats.preemptions,
            "storage": stats.storage,
            "offloaded_blocks": stats.offloaded,
            "restored_blocks": stats.restored,
            "models": list(stats.models),
        }
        dead = client.thread.dead
        degraded = stats.storage not in ("ok", "off")  # it serves, but keeps nothing on disk
        status = "dead" if dead else "degraded" if degraded else "ok"
        return JSONResponse({"status": status, **body}, status_code=503 if dead else 200)

    server.custom_route("/health", methods=["GET"])(health)
    app = server.streamable_http_app(
        host=config.host,
        max_request_body_size=config.max_request_bytes,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),  # the gate does more
    )
    sessions: Any = server.session_manager
    sessions.asgi_app = Messages(sessions.asgi_app, config.max_request_bytes)
    return Gate(app, config)
