"""MCP over streamable HTTP at /mcp, and /health: who gets in, and how they are put together."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import math
import select
import time
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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mcp.config import Config
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.server.arrival import TimedProtocol
from mlx_mcp.server.calls import Activity
from mlx_mcp.server.gate import Gate
from mlx_mcp.server.lifetime import CUT_OFF_S, let_end
from mlx_mcp.server.messages import Messages

LINGER_S = 0.5


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
    """Uvicorn, with the signals left to whoever runs it, and an end that loses no answer.

    To end it: `stop_accepting`, wait while it is `busy`, `hang_up`.
    """

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._app = app
        self._num_open = 0
        self._ending_until = math.inf
        graceful_s = math.ceil(config.shutdown_timeout_s + CUT_OFF_S)
        super().__init__(
            uvicorn.Config(
                self._count,
                interface="asgi3",
                http=cast(Any, partial(TimedProtocol, config.request_timeout_s)),
                ws="none",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=graceful_s,
            )
        )

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer, or may have sent a request that has not arrived.

        A client may connect, or use a connection that is open, at the very moment at which that would be closed. So
        connections are taken for LINGER_S more, each is closed with the answer to its last request, and those without
        any request LINGER_S later.
        """
        transports = [c.transport for c in self._connections if c.transport is not None]
        return (
            self._num_open > 0
            or time.monotonic() < self._ending_until < math.inf
            or any(transport.get_write_buffer_size() for transport in transports)
            or has_unread(transports)
        )

    @property
    def _connections(self) -> list[Any]:
        return list(self.server_state.connections)

    def stop_accepting(self) -> None:
        """Take no further connection from LINGER_S on; requests on those that are open are answered still."""
        self._ending_until = time.monotonic() + 2 * LINGER_S
        for server in self.servers:
            asyncio.get_running_loop().call_later(LINGER_S, server.close)

    def hang_up(self) -> None:
        """Close every connection, streams of notifications too, and have `serve` return."""
        self.should_exit = True
        for connection in self._connections:
            if connection.transport is not None:
                connection.transport.close()

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, and count whoever waits for an answer: requests other than GET, which opens streams."""
        if scope["type"] != "http" or scope["method"] == "GET":
            await self._app(scope, receive, send)
            return

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self._ending_until < math.inf:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        self._num_open += 1
        try:
            await self._app(scope, receive, send_last)
        finally:
            self._num_open -= 1

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield


def has_unread(transports: list[asyncio.Transport]) -> bool:
    """Whether something has come for one of the transports that was not read yet: closing it would lose a request."""
    poll = select.poll()
    for transport in transports:
        if not transport.is_closing():
            poll.register(transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))


async def end(server: HttpServer, activity: Activity, timeout_s: float) -> None:
    """End a server: what was asked of it is answered, with an error once `timeout_s` has passed."""
    server.stop_accepting()
    await let_end(lambda: server.busy, [activity], timeout_s)
    server.hang_up()
