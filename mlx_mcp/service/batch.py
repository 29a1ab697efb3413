"""Has many prompts answered at once over one shared context."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import anyio

from mlx_mcp.chat.message import Message
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.session import MAX_FORKS, SessionInfo
from mlx_mcp.engine.requests import ALIKE, GenerateRequest, Result
from mlx_mcp.errors import EngineDead, InvalidRequest, MlxMcpError
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context, laid_out, read
from mlx_mcp.service.generate import Options, request_of, run
from mlx_mcp.service.models import note_of
from mlx_mcp.service.service import Service, known_sessions

MAX_BRANCHES = MAX_FORKS
Outcome = Result | MlxMcpError
Follow = Callable[[int, GenerateRequest], Awaitable[Result]]


@dataclass(frozen=True)
class Batch:
    """What came of each branch: the n answers to the first prompt, then to the second, and so on."""

    outcomes: list[Outcome]
    model: str
    note: str = ""


async def generate_batch(
    service: Service,
    caller: Caller,
    context: Context,
    prompts: Sequence[str],
    n: int,
    options: Options,
    report: Report,
) -> Batch:
    """Answer each prompt `n` times after the context, which is computed once; no branch sees another's.

    With a `session` and `keep` each branch is kept in a fork of its own. A `seed` counts up over the answers to a
    prompt.

    Raises:
        MlxMcpError: there are too many branches, all of them failed, or the engine is gone.
    """
    check_branches(len(prompts), n, options.sampling)
    files = await read(caller, context.files)
    chats = [laid_out(context.system, files, (*context.messages, Message("user", prompt))) for prompt in prompts]
    requests = requests_of(caller, chats, n, options)
    meters = [Meter() for _ in requests]
    forked = options.keeps and bool(options.session)
    with service.limits.calls(caller.tenant, len(requests)) as admitted:

        async def follow(index: int, request: GenerateRequest) -> Result:
            return await run(service, caller, request, meters[index], partial(report, meters), admitted[index])

        outcomes = await (run_on_forks(service, requests, follow) if forked else run_all(requests, follow))
    answered = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    if not answered:
        raise next(outcome for outcome in outcomes if isinstance(outcome, MlxMcpError))
    return Batch(outcomes, answered[0].model, note_of(service, options.model or options.session))


def check_branches(num_prompts: int, n: int, sampling: Sampling) -> None:
    """Refuse batches that are too large, or whose answers would be all the same.

    Raises:
        InvalidRequest: with what to do instead.
    """
    if num_prompts * n > MAX_BRANCHES:
        raise InvalidRequest(
            f"{num_prompts} prompts × n are {num_prompts * n} branches; there may be {MAX_BRANCHES}. Split the call."
        )
    if n > 1 and sampling.temperature == 0:
        raise InvalidRequest(ALIKE)


def requests_of(
    caller: Caller, chats: Sequence[tuple[Message, ...]], n: int, options: Options
) -> list[GenerateRequest]:
    """What is asked of the engine: `n` times each chat, in one lane, since a batch has one caller's turns."""
    lane, sampling = f"batch {secrets.token_hex(8)}", options.sampling
    drawn = [replace(options, sampling=replace(sampling, seed=nth_seed(sampling.seed, i))) for i in range(n)]
    return [replace(request_of(caller, chat, each, lane), drawn=n > 1) for chat in chats for each in drawn]


def nth_seed(seed: int | None, n: int) -> int | None:
    """The seed of the nth answer to a prompt, counted from 0."""
    return None if seed is None else (seed + n) % 2**32


async def run_all(requests: Sequence[GenerateRequest], follow: Follow) -> list[Outcome]:
    """Run requests at once; one's failure is its own, unless the engine is gone."""

    async def outcome(index: int, request: GenerateRequest) -> Outcome:
        try:
            return await follow(index, request)
        except EngineDead:
            raise
        except MlxMcpError as error:
            return error

    return await asyncio.gather(*(outcome(index, request) for index, request in enumerate(requests)))


async def run_on_forks(service: Service, requests: Sequence[GenerateRequest], follow: Follow) -> list[Outcome]:
    """Run requests of one session at once, each on a fork of its own; forks that come to nothing are closed."""
    owner, session = requests[0].tenant, requests[0].session

    async def fork() -> list[SessionInfo]:
        with service.limits.opening(owner, len(requests), known_sessions(service).values()):
            return await service.engine.fork(owner, session, len(requests))

    forking = asyncio.create_task(fork())
    kept: set[str] = set()
    try:
        forks = await asyncio.shield(forking)  # a call that is cancelled meanwhile must know what to close
        forked = [replace(request, session=fork.session_id) for request, fork in zip(requests, forks, strict=True)]
        outcomes = await run_all(forked, follow)
        kept = {o.session.session_id for o in outcomes if isinstance(o, Result) and o.session is not None}
        return outcomes
    finally:
        with anyio.CancelScope(shield=True), suppress(MlxMcpError):
            unused = {fork.session_id for fork in await forking} - kept
            if unused:
                await service.engine.close_sessions(owner, tuple(unused))
