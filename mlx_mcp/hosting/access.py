"""Which tokens let callers in over HTTP, from the settings and the file of tokens.

Imports little at the top: the process that only holds the socket checks here whether it may serve others.
"""

from __future__ import annotations

import hmac
import logging
import time
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mlx_mcp.config import LOOPBACK, Config
from mlx_mcp.errors import ConfigError, StorageError
from mlx_mcp.process.place import state_folder
from mlx_mcp.storage.token_file import DEFAULT, TokenFile, digest_of

if TYPE_CHECKING:
    from mcp.server.auth.provider import AccessToken

    from mlx_mcp.api.http.oauth import OAuth

logger = logging.getLogger(__name__)


class Access:
    """The tokens of one listener: the one of the settings, those of the file, those of an authorization server.

    See api/http/auth.Tokens.
    """

    def __init__(self, config: Config, file: TokenFile) -> None:
        self._file, self._fault, self._issuer = file, "", config.oauth_issuer
        self._own = None if config.token is None else digest_of(config.token.get_secret_value())
        self._always = self._own is not None or self._issuer is not None or serves_others(config)
        self.scopes: tuple[str, ...] = () if self._issuer is None else config.oauth_scopes
        self.metadata_url = metadata_url(config)
        self._config = config

    @cached_property
    def _oauth(self) -> OAuth:
        from mlx_mcp.api.http.oauth import OAuth

        config = self._config
        assert config.oauth_issuer is not None, "an issuer comes with its audience"
        assert config.oauth_audience is not None, "an issuer comes with its audience"
        return OAuth(config.oauth_issuer, config.oauth_audience, config.oauth_jwks_url)

    @property
    def required(self) -> bool:
        """Whether callers need a token: also where the last one was revoked."""
        return self._always or self._file.exists

    async def verify_token(self, token: str) -> AccessToken | None:
        """See api/http/auth.Tokens."""
        name = self._name_of(token)
        if not name:
            return None if self._issuer is None else await self._oauth.verify_token(token)
        from mcp.server.auth.provider import AccessToken  # a second of imports

        return AccessToken(token=token, client_id=name, scopes=list(self.scopes))

    def _name_of(self, token: str) -> str:
        """The name of a token; empty if there is no such token."""
        if self._own is not None and hmac.compare_digest(digest_of(token), self._own):
            return DEFAULT
        try:
            found, fault = self._file.find(token, time.time()), ""
        except StorageError as error:
            found, fault = None, str(error)
            if fault != self._fault:  # once, not with every request
                logger.error("nobody is let in by a token of the file: %s", error)
        self._fault = fault
        return "" if found is None else found.name


def access_of(config: Config) -> Access:
    """The tokens that let callers in, by these settings.

    Raises:
        ConfigError: others are to be served, and there is no token.
    """
    file = token_file()
    if serves_others(config) and config.token is None and config.oauth_issuer is None and not file.exists:
        whom = "Serving a proxy" if config.trusted_proxies else f"Serving on {config.host}"
        raise ConfigError(
            f"{whom} lets others in, so it needs a token: make one with `mlx-mcp token add NAME`, or set "
            "MLX_MCP_TOKEN, and have clients send it as `Authorization: Bearer …`. Without one, serve on 127.0.0.1."
        )
    return Access(config, file)


def metadata_url(config: Config) -> str:
    """Where clients read which authorization server issues tokens for this one (RFC 9728); empty if none does."""
    if config.oauth_audience is None:
        return ""
    parts = urlsplit(config.oauth_audience)
    return f"{parts.scheme}://{parts.netloc}/.well-known/oauth-protected-resource{parts.path.rstrip('/')}"


def token_file() -> TokenFile:
    """The tokens of this user."""
    return TokenFile(state_folder())


def serves_others(config: Config) -> bool:
    """Whether other machines than this one are served, be it through a proxy."""
    return config.host not in LOOPBACK or bool(config.trusted_proxies)
