"""How much each principal may use, from the settings and from what was said when its token was made."""

from __future__ import annotations

from dataclasses import fields, replace

from mlx_mcp.config import Config
from mlx_mcp.errors import StorageError
from mlx_mcp.hosting.access import token_file
from mlx_mcp.service.limits import Limiter, Limits

NAMES = frozenset(each.name for each in fields(Limits))


def limiter_of(config: Config) -> Limiter:
    """The limits of a process. What a token says of its own takes the place of what the settings say for all."""
    everyone, windows = Limits(**config.limits.model_dump()), Limits(**config.window_limits.model_dump())
    file = token_file()

    def limits_of(tenant: str) -> Limits:
        if not tenant:
            return windows
        try:
            token = file.of(tenant)
        except StorageError:  # nobody gets in by it either
            token = None
        if token is None or not token.limits:
            return everyone
        # 0 is no limit: a token can be given more than the settings allow all of them.
        return replace(everyone, **{name: limit or None for name, limit in token.limits.items() if name in NAMES})

    return Limiter(limits_of)
