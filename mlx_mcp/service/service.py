"""What the use cases work with."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_mcp.core.session import SessionInfo
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.jobs import Jobs
from mlx_mcp.service.limits import Limiter
from mlx_mcp.service.observing import Observer
from mlx_mcp.service.replies import Replies
from mlx_mcp.service.warm import Warm


@dataclass(eq=False)
class Lifecycle:
    """Where in its life the process is: hosting says so."""

    slow_step_s: float = 30.0  # an engine whose step takes longer is not ready
    draining: bool = False  # whether it is about to end, and calls should go elsewhere


@dataclass(frozen=True)
class Service:
    """An engine as one connection sees it, the models that can be asked for there, and what the process has of its own.

    Many may share an engine, and all else that is the process's.
    """

    engine: EngineClient
    registry: Registry
    jobs: Jobs = field(default_factory=Jobs)
    warm: Warm = field(default_factory=Warm)
    limits: Limiter = field(default_factory=Limiter)
    replies: Replies = field(default_factory=Replies)
    observer: Observer = field(default_factory=Observer)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)


def known_sessions(service: Service) -> dict[str, SessionInfo]:
    """The sessions of all tenants by handle, as of the engine's latest step; to look up, not to change.

    Asks nobody and starts nothing: those on disk are known once the engine has begun.
    """
    return service.engine.thread.sessions
