"""Whether the engine can serve, and whether it takes more: the words for it, and the reasons."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_mcp.service.service import Service


@dataclass(frozen=True)
class Readiness:
    """Whether calls should be sent here, and why not."""

    ready: bool
    status: str  # "ok", "degraded", "starting", "draining", "slow" or "dead"
    reasons: tuple[str, ...] = field(default=())


def health(service: Service) -> str:
    """One of "ok", "degraded" (it serves, but keeps nothing on disk though it should) and "dead"."""
    if service.engine.thread.dead:
        return "dead"
    return "ok" if service.engine.stats.storage in ("ok", "off") else "degraded"


def readiness(service: Service) -> Readiness:
    """Whether calls should be sent here now. One that cannot keep anything on disk is degraded, and ready."""
    thread, word = service.engine.thread, health(service)
    if word == "dead":
        return Readiness(False, word, ("The engine has ended. Start the server again.",))
    if service.lifecycle.draining:
        return Readiness(False, "draining", ("The server is about to end. Send calls to another.",))
    step_s, most_s = thread.step_s, service.lifecycle.slow_step_s
    if step_s > most_s:
        told = f"One step of the engine has taken {step_s:.0f} s, longer than ready_step_s ({most_s:g} s)."
        return Readiness(False, "slow", (f"{told} Wait, or start the server again.",))
    if service.engine.stats.opening:
        return Readiness(True, "starting", ("Calls wait until the sessions on disk are known.",))
    if word == "degraded":
        return Readiness(True, word, ("Nothing is kept on disk now. Look in the log for the cause.",))
    return Readiness(True, word)


def started(service: Service) -> bool:
    """Whether the start is over: no call waits any more for the sessions on disk to be found."""
    return not service.engine.stats.opening
