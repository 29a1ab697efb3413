"""Collects what `mlx-mcp engine status` and `mlx-mcp top` show."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mlx_mcp import __version__
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.hosting.connection import Connection
from mlx_mcp.service.jobs import Jobs
from mlx_mcp.service.overview import overview
from mlx_mcp.service.service import Service


def status_of(
    client: EngineClient, connections: Iterable[Connection], jobs: Jobs, began: float, retiring: str
) -> dict[str, Any]:
    """The status of a process that began at `began`, by the monotonic clock."""
    stats, now = client.stats, time.monotonic()
    return {
        "pid": os.getpid(),
        "version": __version__,
        "up_s": now - began,
        "retiring": retiring,
        "step_s": client.thread.step_s,
        "models": list(stats.models),
        "of_models": {name: asdict(model) for name, model in stats.of_models.items()},
        "loading": [*stats.loading, *stats.awaited],
        "weights_bytes": stats.weights_bytes,
        "max_weights_bytes": stats.max_weights_bytes,
        "max_memory_bytes": stats.max_memory_bytes,
        "max_kv_bytes": stats.max_kv_bytes,
        "kv_bytes": stats.kv_bytes,
        "cache_bytes": stats.cache_bytes,
        "rows": stats.rows,
        "waiting": stats.waiting,
        "sessions": stats.sessions,
        "long_calls": jobs.num_running,
        "results": jobs.num_unfetched,
        "connections": [connection_status(joined, client, now) for joined in connections],
    }


def top_of(service: Service, retiring: str) -> dict[str, Any]:
    """What `mlx-mcp top` shows of a process."""
    own = {"pid": os.getpid(), "version": __version__, "retiring": retiring}
    return own | overview(service)


def connection_status(joined: Connection, client: EngineClient, now: float) -> dict[str, Any]:
    """The status of one connection."""
    stats, sessions = client.stats, client.thread.sessions
    calls = list(joined.activity.calls.values())
    running = min(len(calls), stats.groups.get(str(joined.number), 0))
    waiting = [call for call in calls if call.phase not in ("prefill", "decode")]
    held = [sessions[handle] for handle in joined.activity.sessions if handle in sessions]
    return {
        "number": joined.number,
        "kind": joined.kind,
        "pid": joined.pid,
        "parent": joined.hello.get("parent"),
        "host": joined.host or joined.hello.get("address") or "",
        "folder": joined.hello.get("folder") or "",
        "model": joined.model,
        "since_s": now - joined.since,
        "running": running,
        "waiting": len(calls) - running,
        "waits_for": next((call.line or call.phase for call in waiting), "") if running < len(calls) else "",
        "sessions": [session.name or session.session_id for session in held],
    }
