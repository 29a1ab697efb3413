"""What the use cases work with."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mcp.engine.client import EngineClient
from mlx_mcp.models.registry import Registry


@dataclass(frozen=True)
class Service:
    """An engine as one connection sees it, and the models that can be asked for there. Many may share an engine."""

    engine: EngineClient
    registry: Registry
