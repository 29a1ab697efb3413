"""How long work is answered: at once, with a handle when it takes longer than was said, or as a stream; and repeats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from mlx_mcp.api.sessions.bodies import LongBody
from mlx_mcp.api.sessions.problem import problem
from mlx_mcp.api.sessions.shapes import (
    CallState,
    DeltaEvent,
    EndedCall,
    ProgressEvent,
    ResultEvent,
    RunningCall,
)
from mlx_mcp.api.web.endpoint import Asked, answer
from mlx_mcp.api.web.events import encoded, stream
from mlx_mcp.api.web.failure import Failure, failure_of
from mlx_mcp.errors import InvalidRequest, MlxMcpError
from mlx_mcp.service.activity import Meter, progress_line
from mlx_mcp.service.jobs import Job, JobState, Key, Work

NEVER_S = 1e9
BROKEN = "The call failed by a fault of the server's, which its log tells. Make it again."
# How an answer is delivered is not part of what was asked: a repeat may have it in another way.
DELIVERY = {"stream", "wait_s"}


async def answered(asked: Asked, tool: str, work: Work) -> BaseModel | Response:
    """What work returns, or that it still runs when the caller wants to hear.

    Raises:
        InvalidRequest: the call has the key of another one.
        MlxMcpError: what the work raises.
    """
    wait_s = asked.body.wait_s if isinstance(asked.body, LongBody) else None
    job = begun(asked, tool, work)
    try:
        ended = await job.wait(NEVER_S if wait_s is None else wait_s)
    except BaseException:
        abandon(asked, job)
        raise
    if not ended:
        asked.service.jobs.hand_over(job)
        response = answer(running(job), 202)
        response.headers["location"] = f"/v1/results/{job.result_id}"
        return response
    job.fetched = True
    made: BaseModel = job.result()
    return made


async def streamed(asked: Asked, tool: str, work: Work) -> Response:
    """The same as a stream of events, the last of which is the answer or the error.

    Raises:
        InvalidRequest: the call has the key of another one, or both `stream` and `wait_s`.
        MlxMcpError: what the work raises before anything has come of it.
    """
    if asked.body.wait_s is not None:
        raise InvalidRequest("`wait_s` is for a call without a stream: leave out `wait_s` or `stream`.")
    return await stream(events_of(asked, begun(asked, tool, work)))


def begun(asked: Asked, tool: str, work: Work) -> Job:
    """The job of a call: its own, or that of an earlier call with the same key.

    Raises:
        InvalidRequest: the earlier call was another one.
    """
    jobs, owner = asked.service.jobs, asked.caller.tenant
    key = asked.headers.key if asked.headers is not None else None
    return jobs.once(owner, tool, Key(key, fingerprint(asked)), work) if key else jobs.start(owner, tool, work)


def abandon(asked: Asked, job: Job) -> None:
    """End work that nobody can ask for any more."""
    if not asked.service.jobs.is_known(job):
        asked.service.jobs.cancel(job)


def fingerprint(asked: Asked) -> str:
    """What tells whether two calls ask for the same: method, path and body."""
    body = asked.body.model_dump(mode="json", exclude=DELIVERY)
    said = json.dumps([asked.request.method, asked.request.url.path, body], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


async def events_of(asked: Asked, job: Job) -> AsyncGenerator[bytes]:
    """The events of a generation.

    Raises:
        MlxMcpError: what the work raises before the first of them.
    """
    told, num_sent, first = "", 0, True
    try:
        async with aclosing(job.changes()) as changes:
            async for meter, *_ in changes:
                if meter.line != told and not meter.deltas:
                    told, first = meter.line, False
                    yield event(progress_of(meter))
                for delta in meter.deltas[num_sent:]:
                    num_sent, first = num_sent + 1, False
                    yield event(DeltaEvent(kind=delta.kind.value, text=delta.text))
    except BaseException:
        abandon(asked, job)
        raise
    job.fetched = True
    for delta in job.meters[0].deltas[num_sent:] if job.meters else ():
        first = False
        yield event(DeltaEvent(kind=delta.kind.value, text=delta.text))
    if job.error is not None and not first:
        yield encoded(problem(failure_of_work(job.error)).model_dump_json(exclude_none=True), "error")
    else:
        yield event(ResultEvent(result=job.result()))


def progress_of(meter: Meter) -> ProgressEvent:
    """How far a generation is."""
    return ProgressEvent(phase=meter.phase, message=meter.line, done=meter.done, total=meter.total)


def event(made: ProgressEvent | DeltaEvent | ResultEvent) -> bytes:
    """A shape as an event of its type."""
    return encoded(made.model_dump_json(exclude_none=True), made.type)


def running(job: Job) -> RunningCall:
    """A job that has not ended."""
    texts = [meter.text for meter in job.meters]
    return RunningCall(
        result_id=job.result_id,
        tool=job.tool,
        progress=progress_line(job.meters),
        text=(texts[0] or None) if len(texts) == 1 else None,
        texts=texts if len(texts) > 1 else None,
    )


def state_of(job: Job) -> CallState:
    """Where a job is, with what came of it if it has ended."""
    if job.state is JobState.RUNNING:
        return CallState(running(job))
    job.fetched = True
    said: dict[str, Any] = {"status": job.state.value, "result_id": job.result_id, "tool": job.tool}
    if job.error is None:
        return CallState(EndedCall(**said, result=job.outcome))
    if job.cancelled:
        return CallState(EndedCall(**said))
    return CallState(EndedCall(**said, error=problem(failure_of_work(job.error))))


def failure_of_work(error: BaseException) -> Failure:
    """Why work has no outcome."""
    return failure_of(error) if isinstance(error, MlxMcpError) else Failure(500, BROKEN)
