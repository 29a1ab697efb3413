"""/health and what is below it: whether the process lives, has started, and should be sent calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mlx_mcp.service.health import health, readiness, started
from mlx_mcp.service.service import Service

HEADERS = {"cache-control": "no-store"}


def health_routes(service: Service) -> list[Route]:
    """The routes; each answers with 200 or 503, and says why."""

    def live() -> tuple[bool, dict[str, Any]]:
        return True, {"status": "ok"}

    def ready() -> tuple[bool, dict[str, Any]]:
        now = readiness(service)
        return now.ready, {"status": now.status, "reasons": list(now.reasons)}

    def startup() -> tuple[bool, dict[str, Any]]:
        over = started(service)
        return over, {"status": "ok" if over else "starting"}

    def whole() -> tuple[bool, dict[str, Any]]:
        stats, status = service.engine.stats, health(service)
        return status != "dead", {
            "status": status,
            "running": stats.running,
            "waiting": stats.waiting,
            "rows": stats.rows,
            "kv_bytes": stats.kv_bytes,
            "cache_bytes": stats.cache_bytes,
            "sessions": stats.sessions,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "preemptions": stats.preemptions,
            "storage": stats.storage,
            "offloaded_blocks": stats.offloaded,
            "restored_blocks": stats.restored,
            "models": list(stats.models),
        }

    routes = {"/health": whole, "/health/live": live, "/health/ready": ready, "/health/startup": startup}
    return [Route(path, answering(look), methods=["GET"]) for path, look in routes.items()]


def answering(look: Callable[[], tuple[bool, dict[str, Any]]]) -> Callable[[Request], Awaitable[JSONResponse]]:
    """What answers with what is seen when somebody asks."""

    async def answer(request: Request) -> JSONResponse:
        good, body = look()
        return JSONResponse(body, 200 if good else 503, HEADERS)

    return answer
