"""Who calls over HTTP: the token of every request, whatever its path. Knows nothing of where tokens are kept.

Guarantees:
    - Where a token is required, a request without a valid one is answered with 401 before anything of it is read, but
      for paths that are open to all.
    - Every face hears of the same principal: `scope["state"]["tenant"]`, and the SDK's access token with MCP.
    - A token in the query string gets nobody in, and is refused even beside a valid one: addresses end up in logs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol
from urllib.parse import parse_qsl

from mcp.server.auth.middleware.auth_context import auth_context_var
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from starlette.authentication import AuthCredentials
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

IN_QUERY = frozenset(("access_token", "token", "api_key", "api-key", "apikey", "x-api-key", "authorization"))
MAX_TOKEN_CHARS = 16_384

NO_TOKEN = "This server needs a token. Send it as `Authorization: Bearer TOKEN`, or as `x-api-key: TOKEN`."
QUERY_TOKEN = (
    "A token in the query string is not accepted, and may now be in logs: revoke it, and send another as "
    "`Authorization: Bearer TOKEN`."
)
BAD_TOKEN = (
    "The token is not valid: it is unknown, was revoked, has expired, or is for another server. Send one that "
    "`mlx-mcp token add` has shown, or have your authorization server issue another."
)
FEW_SCOPES = (
    "The token is valid, but does not have the scopes {scopes}. Have your authorization server issue one with them."
)

Refuse = Callable[[Scope, int, str], Response]  # a request, a status and a text → an answer in the form of its API


class Tokens(Protocol):
    """Knows the tokens that let callers in."""

    @property
    def required(self) -> bool:
        """Whether callers need one."""

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes that each must have."""

    @property
    def metadata_url(self) -> str:
        """Where clients read which authorization server issues tokens; empty if none does."""

    async def verify_token(self, token: str) -> AccessToken | None:
        """The principal behind a token, as its `client_id`; None if the token is not valid."""


class Auth:
    """Lets requests through to an app, and tells it who sends them."""

    def __init__(self, app: ASGIApp, tokens: Tokens, refuse: Refuse, open_paths: Collection[str] = ()) -> None:
        self._app, self._tokens, self._refuse, self._open_paths = app, tokens, refuse, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or have the app answer."""
        if scope["type"] != "http" or not self._tokens.required or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        told, found = BAD_TOKEN, None
        token = token_of(Headers(scope=scope))
        if IN_QUERY & {name.lower() for name, _ in parse_qsl(scope["query_string"].decode("latin-1"), True)}:
            told = QUERY_TOKEN
        elif not token:
            told = NO_TOKEN
        elif len(token) <= MAX_TOKEN_CHARS:
            found = await self._tokens.verify_token(token)
        if found is None:
            response, error = self._refuse(scope, 401, told), "invalid_token"
        elif missing := [each for each in self._tokens.scopes if each not in found.scopes]:
            told = FEW_SCOPES.format(scopes=" ".join(missing))
            response, error = self._refuse(scope, 403, told), "insufficient_scope"
        else:
            await self._serve(found, scope, receive, send)
            return
        response.headers["www-authenticate"] = challenge(
            error=error if token else "",
            scope=" ".join(self._tokens.scopes) if response.status_code == 403 else "",
            resource_metadata=self._tokens.metadata_url,
        )
        await response(scope, receive, send)

    async def _serve(self, found: AccessToken, scope: Scope, receive: Receive, send: Send) -> None:
        user, state = AuthenticatedUser(found), {**scope.get("state", {}), "tenant": found.client_id}
        scope = {**scope, "state": state, "user": user, "auth": AuthCredentials(found.scopes)}
        reset = auth_context_var.set(user)
        try:
            await self._app(scope, receive, send)
        finally:
            auth_context_var.reset(reset)


def token_of(headers: Headers) -> str:
    """The token that a request has in its headers; empty if it has none, or it is not clear which one."""
    given = headers.getlist("authorization")
    if not given:
        keys = headers.getlist("x-api-key")
        return keys[0].strip() if len(keys) == 1 else ""
    scheme, _, token = given[0].partition(" ")
    return token.strip() if len(given) == 1 and scheme.lower() == "bearer" else ""


def challenge(**parts: str) -> str:
    """The value of a WWW-Authenticate header; parts that are empty are left out."""
    said = ", ".join(f'{name}="{value}"' for name, value in parts.items() if value)
    return f"Bearer {said}".rstrip()
