"""What an answer is known by, before anything of it is there."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from mlx_mcp.api.web.endpoint import Asked
from mlx_mcp.service.models import name_of


@dataclass(frozen=True)
class Head:
    """The id of an answer, the model that was asked for, and when, in seconds since 1970."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


def head_of(asked: Asked, prefix: str) -> Head:
    """A new one; a model that was not named is the default one."""
    return Head(f"{prefix}{secrets.token_hex(16)}", name_of(asked.service, asked.body.model))
