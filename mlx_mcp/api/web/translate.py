"""What the service returns → the shapes that every face answers with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mlx_mcp.api.web.results import (
    Batch,
    Branch,
    CalledTool,
    CancelledCall,
    Closed,
    Forks,
    Generation,
    KeptSession,
    LikelyToken,
    Miss,
    ModelEntry,
    ModelList,
    NewSession,
    PersistedSession,
    ResultEntry,
    ResultList,
    SessionList,
    TokenCount,
    UnloadedModel,
)
from mlx_mcp.service.activity import progress_line
from mlx_mcp.service.batch import Batch as Answers
from mlx_mcp.service.generate import Answered
from mlx_mcp.service.jobs import Job, JobState
from mlx_mcp.service.models import Freed, Model
from mlx_mcp.service.values import CacheMiss, Count, Persisted, Result, SessionInfo

MAX_LISTED = 100


def counts(result: Result) -> dict[str, Any]:
    """How many of the prompt's tokens were in memory, came from disk, and were computed."""
    return {
        "cached_tokens": result.cached_tokens,
        "restored_tokens": result.restored_tokens,
        "computed_tokens": result.prompt_tokens - result.cached_tokens - result.restored_tokens,
    }


def tool_calls(result: Result) -> list[CalledTool] | None:
    """The calls that the model asks for."""
    return [CalledTool(name=c.name, arguments=c.arguments, id=c.call_id or None) for c in result.tool_calls] or None


def handle(result: Result) -> str | None:
    """The session that the answer is kept in."""
    return None if result.session is None else result.session.session_id


def miss(found: CacheMiss | None) -> Miss | None:
    """The miss, without the texts that it has none of."""
    if found is None:
        return None
    return Miss(
        reason=found.reason.value,
        index=found.index,
        before=found.before or None,
        after=found.after or None,
        earlier=found.earlier or None,
        detail=found.detail or None,
    )


def in_one(*notes: str) -> str | None:
    """Notes as one text."""
    return " ".join(filter(None, notes)) or None


def generation(result: Result, note: str = "") -> Generation:
    """All that `generate` tells of a result."""
    return Generation(
        text=result.text,
        finish_reason=result.finish_reason.value,
        model=result.model,
        session=handle(result),
        prompt_tokens=result.prompt_tokens,
        **counts(result),
        completion_tokens=result.completion_tokens,
        reasoning=result.reasoning or None,
        tool_calls=tool_calls(result),
        logprobs=[
            LikelyToken(token=c.text, logprob=c.logprob, top=[(text, logprob) for _, text, logprob in c.top])
            for c in result.logprobs
        ]
        or None,
        miss=miss(result.miss),
        note=in_one(note, *result.notes),
    )


def branch(result: Result, said: Sequence[str]) -> Branch:
    """All that `generate_batch` tells of a result: of reasoning nothing, which would multiply.

    The notes in `said` are left out.
    """
    return Branch(
        text=result.text,
        finish_reason=result.finish_reason.value,
        session=handle(result),
        **counts(result),
        completion_tokens=result.completion_tokens,
        tool_calls=tool_calls(result),
        miss=miss(result.miss),
        note=in_one(*(note for note in result.notes if note not in said)),
    )


def batch(came: Answers) -> Batch:
    """What came of a batch; a branch that failed says why in its place, and what all have to note is noted once."""
    answers = [each for each in came.outcomes if isinstance(each, Result)]
    noted = answers[0].notes if answers else ()
    shared = [note for note in noted if all(note in answer.notes for answer in answers)]
    results = [branch(each, shared) if isinstance(each, Result) else Branch(error=str(each)) for each in came.outcomes]
    return Batch(results=results, model=came.model, note=in_one(came.note, *shared))


def new_session(made: Answered) -> NewSession:
    """The session that a context was computed for."""
    session = made.result.session
    assert session is not None, "a context ends in its session"
    return NewSession(
        session=session.session_id,
        name=session.name or None,
        model=made.result.model,
        tokens=session.num_tokens,
        **counts(made.result),
        miss=miss(made.result.miss),
        note=in_one(made.note, *made.result.notes),
    )


def forks(made: list[SessionInfo], named: bool) -> Forks:
    """The forks of a session, and their names if they were `named`."""
    return Forks(
        sessions=[fork.session_id for fork in made],
        names=[fork.name for fork in made] if named else None,
        model=made[0].model,
        tokens=made[0].num_tokens,
    )


def kept_session(info: SessionInfo, now: float) -> KeptSession:
    """What is told of a session, at a time of the engine's clock."""
    return KeptSession(
        session=info.session_id,
        name=info.name or None,
        model=info.model,
        tokens=info.num_tokens,
        cached_tokens=info.num_cached,
        busy=info.busy,
        pinned=info.pinned,
        ephemeral=info.ephemeral,
        idle_s=round(now - info.used_at),
        expires_in_s=max(0, round(info.used_at + info.ttl_s - now)),
        parent=info.parent_id or None,
        persisted=info.persisted,
        versions=list(info.versions) or None,
    )


def session_list(infos: list[SessionInfo]) -> SessionList:
    """The sessions in their order, no more than a host takes."""
    now = time.monotonic()  # the engine's clock
    return SessionList(
        sessions=[kept_session(info, now) for info in infos[:MAX_LISTED]],
        not_shown=len(infos[MAX_LISTED:]) or None,
    )


def persisted(event: Persisted) -> PersistedSession:
    """What was made durable."""
    info = event.info
    return PersistedSession(
        session=info.session_id,
        name=info.name or None,
        version=event.version or None,
        tokens=info.num_tokens,
        kept_tokens=event.num_kept,
        written_bytes=event.num_bytes,
        expires_in_s=round(info.ttl_s),
    )


def closed_list(infos: list[SessionInfo]) -> Closed:
    """The sessions that were closed, no more than a host takes."""
    return Closed(closed=[info.session_id for info in infos[:MAX_LISTED]], not_shown=len(infos[MAX_LISTED:]) or None)


def token_count(counted: Count) -> TokenCount:
    """How many tokens a prompt has."""
    return TokenCount(
        tokens=counted.prompt_tokens,
        model=counted.model,
        context_tokens=counted.context_tokens,
        left_tokens=max(0, counted.context_tokens - counted.prompt_tokens),
        note=in_one(*counted.notes),
    )


def megabytes(num_bytes: int | None) -> float | None:
    """A number of bytes in megabytes."""
    return None if num_bytes is None else round(num_bytes / 1e6, 1)


def model_entry(model: Model) -> ModelEntry:
    """What is told of a model."""
    entry = model.entry
    return ModelEntry(
        name=entry.spec.name,
        aliases=list(entry.aliases) or None,
        default=entry.default,
        loaded=model.loaded,
        loading=model.loading or None,
        fits=model.fits.value,
        weights_mb=megabytes(model.weights_bytes),
        kv_mb_per_1k_tokens=megabytes(model.kv_bytes_per_1k),
        context_tokens=entry.context_tokens,
        tools=entry.tools,
        thinks=entry.thinks,
        pinned=entry.spec.options.pinned or None,
        calls=model.calls or None,
        sampling=entry.sampling or None,
        about=entry.spec.summary,
    )


def model_list(models: list[Model]) -> ModelList:
    """The models in their order."""
    return ModelList(models=[model_entry(model) for model in models])


def unloaded_model(freed: Freed) -> UnloadedModel:
    """What went from memory."""
    return UnloadedModel(model=freed.name, freed_mb=round(freed.num_bytes / 1e6, 1))


def result_list(jobs: Sequence[Job]) -> ResultList:
    """The jobs that a caller has the handles of."""
    now = time.time()
    return ResultList(
        results=[
            ResultEntry(
                result_id=job.result_id,
                tool=job.tool,
                status=job.state.value,
                age_s=round(now - job.began_at),
                progress=progress_line(job.meters) if job.state is JobState.RUNNING else None,
                fetched=job.fetched or None,
            )
            for job in jobs
        ]
    )


def cancelled(job: Job) -> CancelledCall:
    """Where a job is that was to be cancelled."""
    return CancelledCall(result_id=job.result_id, status=job.state.value)
