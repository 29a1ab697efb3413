"""What is done for each call: bodies → the service → shapes."""

from __future__ import annotations

import time
from bisect import bisect_right

from pydantic import BaseModel
from starlette.responses import Response

from mlx_mcp.api.sessions.calls import answered, state_of, streamed
from mlx_mcp.api.sessions.shapes import CallState, Said, SessionDetail, SessionPage
from mlx_mcp.api.web.endpoint import Asked
from mlx_mcp.api.web.results import CancelledCall, Closed, ResultList, UnloadedModel
from mlx_mcp.api.web.translate import (
    batch,
    cancelled,
    closed_list,
    forks,
    generation,
    kept_session,
    model_entry,
    new_session,
    persisted,
    result_list,
    unloaded_model,
)
from mlx_mcp.service.activity import Report
from mlx_mcp.service.batch import generate_batch
from mlx_mcp.service.generate import generate
from mlx_mcp.service.models import load_model, unload_model
from mlx_mcp.service.sessions import (
    close_sessions,
    create_session,
    find_sessions,
    fork_session,
    list_sessions,
    persist_session,
)
from mlx_mcp.service.transcripts import transcript
from mlx_mcp.service.values import Origin

CANCEL_S = 5.0  # what ends within that time is said to have ended


async def create(asked: Asked) -> BaseModel | Response:
    """Compute a context once, to go on from many times."""

    async def work(report: Report) -> BaseModel:
        given = asked.body
        return new_session(
            await create_session(
                asked.service, asked.caller, given.context(), given.model, tuple(given.tools), given.how(), report
            )
        )

    return await answered(asked, "create_session", work)


async def show_all(asked: Asked) -> SessionPage:
    """List sessions, a page at a time. In the order of handles, so that one that is used meanwhile is not missed."""
    infos = sorted(await list_sessions(asked.service, asked.caller), key=lambda info: info.session_id)
    begin = bisect_right(infos, asked.query.after, key=lambda info: info.session_id)
    end = begin + asked.query.limit
    more = end < len(infos)
    now = time.monotonic()
    return SessionPage(
        sessions=[kept_session(info, now) for info in infos[begin:end]],
        next=infos[end - 1].session_id if more else None,
    )


async def show(asked: Asked) -> SessionDetail:
    """Tell of one session."""
    (info,) = await find_sessions(asked.service, asked.caller, (session_of(asked),))
    told = kept_session(info, time.monotonic()).model_dump()
    if not asked.query.transcript:
        return SessionDetail(**told)
    found = await transcript(asked.service, asked.caller, session_of(asked))
    transcribed = []
    for said in found.messages:
        origin = found.origin(said) or Origin()
        message = Said(role=said.role or None, text=said.text, at=origin.at or None, who=origin.who or None)
        transcribed.append(message)
    return SessionDetail(**told, transcript=transcribed)


async def fork(asked: Asked) -> BaseModel | Response:
    """Make sessions that go on from another one."""

    async def work(report: Report) -> BaseModel:
        given, names = asked.body, tuple(asked.body.names)
        made = await fork_session(asked.service, asked.caller, session_of(asked), given.count, names, given.version)
        return forks(made, bool(names))

    return await answered(asked, "fork_session", work)


async def go_on(asked: Asked) -> BaseModel | Response:
    """Have a session's next turn answered."""

    async def work(report: Report) -> BaseModel:
        given = asked.body
        made = await generate(asked.service, asked.caller, given.context(), given.how(session_of(asked)), report)
        return generation(made.result, made.note)

    return await (streamed if asked.body.stream else answered)(asked, "generate", work)


async def persist(asked: Asked) -> BaseModel | Response:
    """Make a session durable."""

    async def work(report: Report) -> BaseModel:
        return persisted(await persist_session(asked.service, asked.caller, session_of(asked), asked.body.version))

    return await answered(asked, "persist_session", work)


async def close(asked: Asked) -> Closed:
    """End a session, and delete what is on disk of it."""
    return closed_list(await close_sessions(asked.service, asked.caller, (session_of(asked),), False))


async def answer_many(asked: Asked) -> BaseModel | Response:
    """Answer many prompts at once over one context."""

    async def work(report: Report) -> BaseModel:
        given = asked.body
        return batch(
            await generate_batch(
                asked.service, asked.caller, given.context(), given.prompts, given.n, given.how(), report
            )
        )

    return await answered(asked, "generate_batch", work)


async def load(asked: Asked) -> BaseModel | Response:
    """Have a model in memory before it is needed."""

    async def work(report: Report) -> BaseModel:
        return model_entry(await load_model(asked.service, asked.caller, asked.request.path_params["name"], report))

    return await answered(asked, "load_model", work)


async def unload(asked: Asked) -> UnloadedModel:
    """Have a model's weights go from memory."""
    return unloaded_model(await unload_model(asked.service, asked.request.path_params["name"]))


async def show_results(asked: Asked) -> ResultList:
    """List the calls whose results can be fetched, the newest first."""
    return result_list(asked.service.jobs.of(asked.caller.tenant))


async def show_result(asked: Asked) -> CallState:
    """Wait for a call that began with wait_s."""
    job = asked.service.jobs.get(asked.caller.tenant, asked.request.path_params["id"])
    await job.wait(asked.query.wait_s)
    return state_of(job)


async def drop_result(asked: Asked) -> CancelledCall:
    """End a call if it still runs, and forget its result."""
    jobs = asked.service.jobs
    job = jobs.get(asked.caller.tenant, asked.request.path_params["id"])
    jobs.drop(job)
    await job.wait(CANCEL_S)
    return cancelled(job)


def session_of(asked: Asked) -> str:
    """The session that the path names, by handle or name."""
    session: str = asked.request.path_params["id"]
    return session
