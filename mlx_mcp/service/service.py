"""What the use cases work with."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_mcp.core.session import SessionInfo
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.jobs import Jobs
from mlx_mcp.service.limits import Limiter
from mlx_mcp.service.replies import Replies
from mlx_mcp.service.warm import Warm


@dataclass(frozen=True)
class Service:
    """An engine as one connection sees it, the models that can be asked for there, and what the process has of its own.

    Many may share an engine, its jobs, its warm contexts and the limits of principals.
    """

    engine: EngineClient
    registry: Registry
    jobs: Jobs = field(default_factory=Jobs)
    warm: Warm = field(default_factory=Warm)
    limits: Limiter = field(default_factory=Limiter)
    replies: Replies = field(default_factory=Replies)


def known_sessions(service: Service) -> dict[str, SessionInfo]:
    """The sessions of all tenants by handle, as of the engine's latest step; to look up, not to change.

    Asks nobody and starts nothing: those on disk are known once the engine has begun.
    """
    return service.engine.thread.sessions
