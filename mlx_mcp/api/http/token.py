"""The one token over HTTP: whoever has it gets in, and is one caller."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from pydantic import AnyHttpUrl

from mlx_mcp.config import Config


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
