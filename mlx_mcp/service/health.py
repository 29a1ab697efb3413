"""Whether the engine can serve: the one word for it."""

from __future__ import annotations

from mlx_mcp.service.service import Service


def health(service: Service) -> str:
    """One of "ok", "degraded" (it serves, but keeps nothing on disk though it should) and "dead"."""
    if service.engine.thread.dead:
        return "dead"
    return "ok" if service.engine.stats.storage in ("ok", "off") else "degraded"
