"""The certificate and the key that HTTPS is served with."""

from __future__ import annotations

import ssl

from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError


def tls_context(config: Config) -> ssl.SSLContext | None:
    """What HTTPS is served with, TLS 1.2 or later; None where HTTP is served.

    Raises:
        ConfigError: certificate and key cannot be used.
    """
    if config.tls_cert is None:
        return None
    context, key = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config.tls_key or config.tls_cert
    try:
        context.load_cert_chain(config.tls_cert, key, password=no_password)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError(
            f"HTTPS cannot be served with {config.tls_cert} and {key}: {why}. Set tls_cert and tls_key to a "
            "certificate chain and its key, both PEM and without a password."
        ) from error
    return context


def no_password() -> str:
    """Refuse a key that needs a password, which would be asked for at a terminal.

    Raises:
        ValueError: always.
    """
    raise ValueError("the key has a password")
