"""What the use cases work with."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_mcp.engine.client import EngineClient
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.jobs import Jobs


@dataclass(frozen=True)
class Service:
    """An engine as one connection sees it, the models that can be asked for there, and the jobs of the process.

    Many may share an engine and its jobs.
    """

    engine: EngineClient
    registry: Registry
    jobs: Jobs = field(default_factory=Jobs)
