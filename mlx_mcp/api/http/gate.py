"""Who may call over HTTP, by host and origin: the same for every route. Knows nothing of MCP.

A page in a browser can have its own name lead to this machine (DNS rebinding), so a request must be for a name that is
known to be ours. It can call across origins too, so an Origin must be this machine's own or one that was allowed. Those
may read the answers (CORS), and no others.
"""

from __future__ import annotations

import re
import socket
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mcp.config import LOOPBACK, Config

HOST = re.compile(r"(\[[0-9a-f:.%]+\]|[^\[\]:/@\s]+)(?::\d+)?")
ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(?::\d+)?")
METHODS = "DELETE, GET, POST"
REQUEST_HEADERS = (
    "accept",
    "anthropic-beta",
    "anthropic-version",
    "authorization",
    "content-type",
    "idempotency-key",
    "last-event-id",
    "mcp-method",
    "mcp-name",
    "mcp-protocol-version",
    "mcp-session-id",
    "traceparent",
    "tracestate",
    "x-api-key",
)
RESPONSE_HEADERS = "mcp-protocol-version, mcp-session-id, retry-after, www-authenticate"
PREFLIGHT_S = 600  # how long a browser need not ask again


class Gate:
    """Lets requests through to an app; answers browsers that ask whether they may."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._app = app
        self._hosts = {bracketed(name) for name in LOOPBACK} | {name.lower() for name in config.allowed_hosts}
        self._origins = {origin.lower().rstrip("/") for origin in config.allowed_origins}
        self._elsewhere = config.host not in LOOPBACK  # other machines can connect
        if self._elsewhere:
            own = socket.gethostname().lower()
            self._hosts |= {bracketed(config.host.lower()), own, f"{own.partition('.')[0]}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or have the app answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origins = headers.getlist("origin")
        refusal = self._refusal(headers.getlist("host"), origins)
        if refusal is not None:
            await refusal(scope, receive, send)
        elif origins and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await preflight(origins[0], headers)(scope, receive, send)
        else:
            await self._app(scope, receive, readable_by(origins[0], send) if origins else send)

    def _refusal(self, hosts: list[str], origins: list[str]) -> Response | None:
        if len(hosts) != 1 or not self._is_ours(hosts[0].lower()):
            told = (
                f"{', '.join(hosts)[:200]!r} is not known to be this server. MLX_MCP_ALLOWED_HOSTS lists other names."
            )
            return PlainTextResponse(told, 421)
        for origin in origins:
            if not self._may_call(origin.lower()):
                told = (
                    f"Pages of {origin[:200]!r} may not call this server. MLX_MCP_ALLOWED_ORIGINS lists those that may."
                )
                return PlainTextResponse(told, 403)
        return None

    def _is_ours(self, host: str) -> bool:
        found = HOST.fullmatch(host)
        if found is None:
            return False
        if self._elsewhere and is_address(found[1].strip("[]")):  # which no page can have lead elsewhere
            return True
        return not self._hosts.isdisjoint((host, found[1], "*"))

    def _may_call(self, origin: str) -> bool:
        found = ORIGIN.fullmatch(origin)
        return origin in self._origins or (found is not None and found[1] in map(bracketed, LOOPBACK))


def preflight(origin: str, headers: Headers) -> Response:
    """The answer to a browser that asks what an allowed page may send."""
    asked = headers.get("access-control-request-headers", "").lower().split(",")
    may = sorted({*REQUEST_HEADERS, *filter(None, map(str.strip, asked))})
    answer = {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": METHODS,
        "access-control-allow-headers": ", ".join(may),
        "access-control-max-age": str(PREFLIGHT_S),
        "vary": "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
    }
    if headers.get("access-control-request-private-network") == "true":
        answer["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=answer)


def readable_by(origin: str, send: Send) -> Send:
    """Send a response that an allowed page may read."""

    async def send_readable(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = RESPONSE_HEADERS
            headers.add_vary_header("Origin")
        await send(message)

    return send_readable


def bracketed(name: str) -> str:
    """A name or address as URLs have it."""
    return f"[{name}]" if ":" in name else name


def is_address(name: str) -> bool:
    """Whether it is an IP address rather than a name."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
