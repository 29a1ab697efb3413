"""Makes sessions, forks them, makes them durable, lists and ends them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.session import SessionInfo, SessionOptions
from mlx_mcp.engine.messages import Persisted
from mlx_mcp.engine.requests import GenerateRequest
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import BREAK, Context, chat, with_text
from mlx_mcp.service.generate import Answered, run
from mlx_mcp.service.models import note_of
from mlx_mcp.service.service import Service, known_sessions

UNPINNED_NOTE = (
    "It is not pinned: pinned sessions may take half of the memory for keys and values. Close some of them, or have "
    "the server started with a larger max_kv_bytes."
)


async def create_session(
    service: Service,
    caller: Caller,
    context: Context,
    model: str,
    tools: tuple[dict[str, Any], ...],
    options: SessionOptions,
    report: Report,
) -> Answered:
    """Compute a context that calls go on from; the result has its session, and no text.

    If the context ends in a message of the user, the prompts to come go on with that message.

    Raises:
        MlxMcpError: see EngineClient.generate; and InvalidRequest for files that cannot be read.
    """
    messages = context.messages
    if messages and messages[-1].role == "user":
        messages = (*messages[:-1], with_text(messages[-1], after=BREAK))
    request = GenerateRequest(
        await chat(caller, replace(context, messages=messages)),
        model or None,
        Sampling(max_tokens=1),
        tools=tools,
        who=caller.who,
        tenant=caller.tenant,
        opens=options,
        context=True,
    )
    meter = Meter()
    result = await run(service, caller, request, meter, partial(report, [meter]))
    assert result.session is not None, "a context ends in its session"
    unpinned = UNPINNED_NOTE if options.pinned and not result.session.pinned else ""
    return Answered(result, " ".join(filter(None, (note_of(service, model), unpinned))))


async def fork_session(
    service: Service, caller: Caller, session: str, count: int | None, names: tuple[str, ...], version: str
) -> list[SessionInfo]:
    """New sessions that go on from another one: as many as were asked for, or one for each name, or one.

    Raises:
        MlxMcpError: see EngineClient.fork; and RateLimited.
    """
    num, limits = count or len(names) or 1, service.limits
    with limits.opening(caller.tenant, num, known_sessions(service).values()):
        limits.request(caller.tenant)
        await service.warm.ready(service, caller, session)
        forks = await service.engine.fork(caller.tenant, session, num, names, version)
    caller.activity.sessions.update(fork.session_id for fork in forks)
    return forks


async def persist_session(service: Service, caller: Caller, session: str, version: str) -> Persisted:
    """Make a session durable.

    Raises:
        MlxMcpError: see EngineClient.persist; and RateLimited.
    """
    if service.limits.weighs_disk(caller.tenant):
        info = await service.engine.session(caller.tenant, session)
        mine = [each for each in known_sessions(service).values() if each.tenant == caller.tenant]
        again = info.persisted if not version else version in info.versions
        more = 0 if again else token_bytes(service, info) * info.num_tokens
        service.limits.check_disk(caller.tenant, sum(stored_bytes(service, each) for each in mine), more)
    service.limits.request(caller.tenant)
    return await service.engine.persist(caller.tenant, session, version)


async def list_sessions(service: Service, caller: Caller) -> list[SessionInfo]:
    """The caller's sessions, those used last first.

    Raises:
        EngineDead: the engine thread has ended.
    """
    infos = await service.engine.sessions(caller.tenant)
    return sorted(infos, key=lambda info: info.used_at, reverse=True)


async def find_sessions(service: Service, caller: Caller, sessions: tuple[str, ...]) -> list[SessionInfo]:
    """The caller's sessions of these handles or names.

    Raises:
        UnknownSession: one of them is not there.
        EngineDead: the engine thread has ended.
    """
    return [await service.engine.session(caller.tenant, session) for session in sessions]


async def close_sessions(
    service: Service, caller: Caller, sessions: tuple[str, ...], everything: bool
) -> list[SessionInfo]:
    """End these sessions, or all of the caller's that are not persisted.

    Raises:
        InvalidRequest: neither or both were asked for.
        UnknownSession: one of them is not there; then none is closed.
        EngineDead: the engine thread has ended.
    """
    if everything == bool(sessions):
        raise InvalidRequest(
            "Give the `sessions` to close, or all=true to close all of yours but persisted ones; one of the two."
        )
    return await service.engine.close_sessions(caller.tenant, sessions)


def stored_bytes(service: Service, info: SessionInfo) -> int:
    """What a session takes on disk, about: it and each of its versions as if they shared no block."""
    return (info.persisted + len(info.versions)) * info.num_tokens * token_bytes(service, info)


def token_bytes(service: Service, info: SessionInfo) -> int:
    """What a token of a session takes; 0 if that is not known, since its model is not in memory."""
    model = service.engine.stats.of_models.get(info.model)
    return 0 if model is None else model.kv_token_bytes
