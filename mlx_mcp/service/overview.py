"""All that is going on in a process at one moment, as plain values: for the page, and for `mlx-mcp top`.

Nothing of what was said is in it. Names of sessions are, of which a caller sees its own alone.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import Any

from mlx_mcp.core.session import SessionInfo
from mlx_mcp.service.health import readiness
from mlx_mcp.service.observing import RunningWorkflow, Watched
from mlx_mcp.service.service import Service

MAX_CALLS, MAX_SESSIONS = 200, 500  # that are listed; all are counted
RUNS = ("prefill", "decode")


def overview(service: Service, tenant: str | None = None) -> dict[str, Any]:
    """What goes on now, with the names of one tenant's sessions, or of all if `tenant` is None.

    Times are seconds, sizes bytes; counts of tokens and evictions are since the start of the process.
    """
    stats, observer, now = service.engine.stats, service.observer, time.monotonic()
    infos = list(service.engine.thread.sessions.values())
    known = {(info.tenant, name): info for info in infos for name in (info.session_id, info.name) if name}
    state, active = readiness(service), list(observer.active.values())
    calls = [
        call_of(watched, known.get((watched.request.tenant, watched.request.session)), tenant, now)
        for watched in active[:MAX_CALLS]
    ]
    return {
        "status": state.status,
        "ready": state.ready,
        "reasons": list(state.reasons),
        "up_s": now - observer.began_at,
        "step_s": service.engine.thread.step_s,
        "running": stats.running,
        "waiting": stats.waiting,
        "preemptions": stats.preemptions,
        "calls": calls,
        "num_calls": len(active),
        "workflows": [workflow_of(each, tenant, now) for each in observer.workflows[:MAX_CALLS]],
        "sessions": sessions_of(infos, tenant, now),
        "num_sessions": len(infos),
        "models": [{"name": name, **asdict(model)} for name, model in stats.of_models.items()],
        "loading": list(stats.loading),
        "awaited": list(stats.awaited),
        "memory": {
            "weights": stats.weights_bytes,
            "max_weights": stats.max_weights_bytes,
            "rows": stats.kv_reserved_bytes,
            "cached": stats.cache_bytes,
            "pinned": stats.cache_pinned_bytes,
            "pending": stats.pending_bytes,
            "max_kv": stats.max_kv_bytes,
        },
        "disk": {"ok": stats.storage in ("ok", "off"), "on": stats.storage != "off", "bytes": stats.disk_bytes},
        "tokens": {
            "prompt": stats.prompt_tokens,
            "cached": stats.cached_tokens,
            "restored": stats.restored_tokens,
            "computed": stats.computed_tokens,
            "output": stats.output_tokens,
        },
        "evictions": {"memory": stats.evictions, "disk": stats.disk_evictions},
        "errors": dict(sorted(observer.errors.items())),
    }


def call_of(watched: Watched, session: SessionInfo | None, tenant: str | None, now: float) -> dict[str, Any]:
    """A generation that goes on or waits, without its text; `session` is the one whose turn it is."""
    request, meter = watched.request, watched.meter
    seconds = now - (watched.first_at or now)
    return {
        "number": watched.number,
        "connection": watched.group,
        "model": "" if session is None else session.model,
        "session": "" if session is None else label(session, tenant),
        "runs": meter.phase in RUNS,
        "phase": meter.phase,
        "does": words_of(watched) if own(request.tenant, tenant) else meter.phase,
        "done": meter.done,
        "total": meter.total,
        "tokens": watched.num_tokens,
        "tokens_per_s": (watched.num_tokens - 1) / seconds if seconds > 0 and watched.num_tokens > 1 else 0.0,
        "since_s": now - watched.began_at,
    }


def workflow_of(running: RunningWorkflow, tenant: str | None, now: float) -> dict[str, Any]:
    """A workflow that goes on: how far it is, and in what it runs."""
    return {
        "number": running.number,
        "tool": running.kind,
        "name": running.name if own(running.tenant, tenant) else "",
        "does": running.line(),
        "since_s": now - running.began_at,
    }


def words_of(watched: Watched) -> str:
    """What a generation does or waits for, in words that are not its own."""
    if watched.first_at is not None:
        return f"generating: {watched.num_tokens} tokens"
    return watched.meter.line or watched.meter.phase


def sessions_of(infos: list[SessionInfo], tenant: str | None, now: float) -> list[dict[str, Any]]:
    """The sessions that were used last and those that they are forks of, in the order in which they were made."""
    by_id = {info.session_id: info for info in infos}
    listed: set[str] = set()
    for info in sorted(infos, key=lambda info: info.used_at, reverse=True):
        line: SessionInfo | None = info
        while line is not None and line.session_id not in listed and len(listed) < MAX_SESSIONS:
            listed.add(line.session_id)
            line = by_id.get(line.parent_id)
    return [
        {
            "id": token_of(info.session_id),
            "parent": token_of(info.parent_id) if info.parent_id in listed else "",
            "name": label(info, tenant),
            "model": info.model,
            "tokens": info.num_tokens,
            "cached": info.num_cached,
            "busy": info.busy,
            "pinned": info.pinned,
            "ephemeral": info.ephemeral,
            "persisted": info.persisted,
            "idle_s": max(0.0, now - info.used_at),
        }
        for info in infos
        if info.session_id in listed
    ]


def token_of(session_id: str) -> str:
    """Something by which a session is known from one look to the next, and by which nobody can use it."""
    return hashlib.blake2b(session_id.encode(), digest_size=6).hexdigest()


def label(info: SessionInfo, tenant: str | None) -> str:
    """The name of a session, or the beginning of its handle: too little of it to use the session by; "" for others'."""
    if not own(info.tenant, tenant):
        return ""
    return info.name or f"{info.session_id[:8]}…"


def own(owner: str, tenant: str | None) -> bool:
    """Whether what an owner has is for whoever looks; None looks on behalf of the whole process."""
    return tenant in (None, owner)
