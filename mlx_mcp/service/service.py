"""What the use cases work with."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_mcp.engine.client import EngineClient
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.jobs import Jobs
from mlx_mcp.service.replies import Replies
from mlx_mcp.service.warm import Warm


@dataclass(frozen=True)
class Service:
    """An engine as one connection sees it, the models that can be asked for there, and what the process has of its own.

    Many may share an engine, its jobs and its warm contexts.
    """

    engine: EngineClient
    registry: Registry
    jobs: Jobs = field(default_factory=Jobs)
    warm: Warm = field(default_factory=Warm)
    replies: Replies = field(default_factory=Replies)
