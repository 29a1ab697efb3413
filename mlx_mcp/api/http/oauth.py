"""Access tokens of an authorization server: signed JWTs that name this server, checked with the issuer's public keys.

Guarantees:
    - A token gets in only if a key of the issuer has signed it, by public-key cryptography, and if it names the issuer,
      this server as its audience, whom it stands for, and an end that has not come.
    - Whatever a token says, the issuer is asked for its keys at most every ASK_S.
    - If the issuer cannot be reached, keys that were read stay in use.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import jwt
from jwt.exceptions import PyJWTError
from mcp.server.auth.provider import AccessToken

logger = logging.getLogger(__name__)

# The algorithms that are taken, each with the type of its keys. None has a secret that the issuer would share.
KEY_TYPES = {f"{kind}{size}": "RSA" for kind in ("RS", "PS") for size in (256, 384, 512)}
KEY_TYPES |= {f"ES{size}": "EC" for size in (256, 384, 512)} | {"EdDSA": "OKP"}
ASK_S = 10.0
KEYS_S = 3600.0  # a key that the issuer has withdrawn is used no longer
TIMEOUT_S = 5.0
LEEWAY_S = 30  # for clocks that differ
MAX_BYTES = 1 << 20
MAX_SUBJECT_CHARS = 255
METADATA = ("oauth-authorization-server", "openid-configuration")


class OAuth:
    """Checks the access tokens of one issuer for one audience."""

    def __init__(
        self, issuer: str, audience: str, jwks_url: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._issuer, self._audience, self._jwks_url, self._clock = issuer, audience, jwks_url, clock
        self._keys: list[dict[str, Any]] = []  # as JWK
        self._asked_at = self._read_at = float("-inf")
        self._asking = asyncio.Lock()

    async def verify_token(self, token: str) -> AccessToken | None:
        """The principal behind a token, issuer and subject together; None if the token is not valid."""
        try:
            header = jwt.get_unverified_header(token)
            algorithm, kid = header.get("alg"), header.get("kid")
            if algorithm not in KEY_TYPES:
                return None
            key = await self._key(kid, algorithm)
            if key is None:
                return None
            claims = jwt.decode(
                token,
                jwt.PyJWK(key, algorithm),
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (PyJWTError, ValueError, TypeError, RecursionError):
            return None
        subject = claims["sub"]
        if not (isinstance(subject, str) and 0 < len(subject) <= MAX_SUBJECT_CHARS and subject.isprintable()):
            return None
        principal = f"{self._issuer} {subject}"  # which no name of a token can be
        return AccessToken(token=token, client_id=principal, scopes=scopes_of(claims), expires_at=int(claims["exp"]))

    async def _key(self, kid: object, algorithm: str) -> dict[str, Any] | None:
        """The issuer's key of that id; the only one that fits if the token names none."""
        found = self._find(kid, algorithm)
        if found is not None and self._clock() - self._read_at < KEYS_S:
            return found
        async with self._asking:
            if self._clock() - self._asked_at >= ASK_S:
                self._asked_at = self._clock()
                try:
                    self._keys = await asyncio.to_thread(self._read_keys)
                    self._read_at = self._clock()
                except (OSError, ValueError, KeyError, TypeError) as error:
                    logger.warning("the keys of %s cannot be read: %s", self._issuer, error)
        return self._find(kid, algorithm)

    def _find(self, kid: object, algorithm: str) -> dict[str, Any] | None:
        fitting = [
            key
            for key in self._keys
            if key.get("kty") == KEY_TYPES[algorithm]
            and key.get("alg", algorithm) == algorithm
            and key.get("use", "sig") == "sig"
        ]
        if kid is None:
            return fitting[0] if len(fitting) == 1 else None
        return next((key for key in fitting if key.get("kid") == kid), None)

    def _read_keys(self) -> list[dict[str, Any]]:
        """Ask the issuer for its keys.

        Raises:
            OSError: it cannot be reached, or refuses.
            ValueError: what it says is no JSON, or not about it.
            KeyError: a part of it is missing.
            TypeError: a part of it is something else.
        """
        return [key for key in read_json(self._jwks_url or self._find_jwks())["keys"] if isinstance(key, dict)]

    def _find_jwks(self) -> str:
        """Where the keys are, as the issuer's metadata says (RFC 8414, and OpenID Connect Discovery)."""
        parts = urlsplit(self._issuer)
        origin, path = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/")
        # RFC 8414 puts the well-known part before the issuer's path, OpenID Connect after it.
        urls = (f"{origin}/.well-known/{METADATA[0]}{path}", f"{origin}{path}/.well-known/{METADATA[1]}")
        for url in urls:
            try:
                metadata = read_json(url)
            except OSError:
                continue
            if metadata["issuer"] != self._issuer:
                raise ValueError(f"{url} is about {str(metadata['issuer'])[:200]}")
            return str(metadata["jwks_uri"])
        raise OSError(f"neither {urls[0]} nor {urls[1]} answers; set oauth_jwks_url")


def scopes_of(claims: dict[str, Any]) -> list[str]:
    """The scopes of a token, in either of the forms that servers write them in."""
    said = claims.get("scope", claims.get("scp", ""))
    return said.split() if isinstance(said, str) else [each for each in said if isinstance(each, str)]


def read_json(url: str) -> dict[str, Any]:
    """Read a JSON object from a URL.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url[:200]} is no URL of a web server")
    request = urllib.request.Request(url, headers={"accept": "application/json"})
    with urllib.request.build_opener(NoRedirect).open(request, timeout=TIMEOUT_S) as response:
        value = json.loads(response.read(MAX_BYTES))
    if not isinstance(value, dict):
        raise ValueError(f"{url[:200]} is no JSON object")
    return value


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: one could lead to a server that was not meant, or away from https."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """See HTTPRedirectHandler."""
