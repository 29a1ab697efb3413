"""MCP over streamable HTTP at /mcp, and /health: who gets in, and how they are put together."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import uvicorn
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import AnyHttpUrl
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from mlx_mcp.config import Config
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.server.arrival import TimedProtocol
from mlx_mcp.server.gate import Gate
from mlx_mcp.server.messages import Messages


class BearerToken:
    """Accepts one token, compared in constant time."""

    def __init__(self, token: str) -> None:
        self._digest = digest(token)

    async def verify_token(self, token: str) -> AccessToken | None:
        """The caller behind the token; None refuses it."""
        if not hmac.compare_digest(digest(token), self._digest):
            return None
        return AccessToken(token=token, client_id="bearer", scopes=[], expires_at=None)


def digest(token: str) -> bytes:
    """A token's digest: of equal length for every token, and of bytes, which compare_digest takes whatever they are."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def auth_settings(config: Config) -> dict[str, Any]:
    """What build_server needs so that only callers with the token get in; nothing where no token is set."""
    if config.token is None:
        return {}
    url = AnyHttpUrl(f"http://{config.host}:{config.port or 80}")
    auth = AuthSettings(issuer_url=url, resource_server_url=None, required_scopes=[], validate_token_resource=False)
    return {"auth": auth, "token_verifier": BearerToken(config.token.get_secret_value())}


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


class HttpServer(uvicorn.Server):
    """Uvicorn, with the signals left to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield


def http_server(app: ASGIApp, config: Config) -> HttpServer:
    """A server for the app; set its `should_exit` to end it."""
    return HttpServer(
        uvicorn.Config(
            app,
            http=cast(Any, partial(TimedProtocol, config.request_timeout_s)),
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(config.shutdown_timeout_s)),
        )
    )
