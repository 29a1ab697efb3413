"""Has chats or bare prompts answered several times at once, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace

import anyio

from mlx_mcp.engine.requests import Delta, GenerateRequest, Progress, Result
from mlx_mcp.errors import InvalidRequest, MlxMcpError
from mlx_mcp.service.activity import Meter
from mlx_mcp.service.batch import check_branches, requests_of
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context, chat
from mlx_mcp.service.generate import Options, updates_of
from mlx_mcp.service.limits import AdmittedCall
from mlx_mcp.service.service import Service
from mlx_mcp.service.sessions import fork_session

# Which of the answers it belongs to, counted from 0, and what has come of that.
Piece = tuple[int, Progress | Delta | Result]


async def stream_answers(
    service: Service, caller: Caller, context: Context, n: int, options: Options, parent: str = ""
) -> AsyncGenerator[Piece, None]:
    """Answer a context `n` times at once: pieces of all answers as they come, each answer's Result last.

    The prompt is computed once, and a `seed` counts up. Ends with the first answer that fails. With a `parent` the
    answer is kept in a new fork of that session, which has the name of `options.opening`, and is closed again if the
    answer fails. Close the generator to free the rows.

    Raises:
        MlxMcpError: see `generate`; and InvalidRequest for several answers that a session would have to go on with.
    """
    check_branches(1, n, options.sampling)
    if n > 1 and (options.keeps or parent):
        raise InvalidRequest(
            f"A session goes on with one answer, and n is {n}: give n=1, or keep=false, or fork the session n times."
        )
    messages = await chat(caller, context)
    if not parent:
        requests = requests_of(caller, [messages], n, options)
        async with aclosing(stream_requests(service, caller, requests)) as pieces:
            async for piece in pieces:
                yield piece
        return
    last: list[Piece] = []  # told when the fork is sure to stay
    async with forked(service, caller, parent, options.opening.name) as fork:
        requests = requests_of(caller, [messages], 1, replace(options, session=fork))
        async with aclosing(stream_requests(service, caller, requests)) as pieces:
            async for piece in pieces:
                if isinstance(piece[1], Result):
                    last.append(piece)
                else:
                    yield piece
    for piece in last:
        yield piece


async def stream_completions(
    service: Service, caller: Caller, prompts: Sequence[str], n: int, options: Options
) -> AsyncGenerator[Piece, None]:
    """Go on with each bare prompt `n` times: no chat template is put around it, and control tokens in it count as such.

    The answers are counted as those of a batch: first the n answers to the first prompt.

    Raises:
        MlxMcpError: see `stream_answers`.
    """
    check_branches(len(prompts), n, options.sampling)
    bare: tuple[tuple[()], ...] = ((),) * len(prompts)
    requests = requests_of(caller, bare, n, options)
    raw = [replace(request, raw=prompts[index // n]) for index, request in enumerate(requests)]
    async with aclosing(stream_requests(service, caller, raw)) as pieces:
        async for piece in pieces:
            yield piece


async def stream_requests(
    service: Service, caller: Caller, requests: Sequence[GenerateRequest]
) -> AsyncGenerator[Piece, None]:
    """Run requests at once; the first that fails ends all."""
    if len(requests) == 1:  # without a task of its own, which costs time at every token
        async with aclosing(updates_of(service, caller, requests[0], Meter())) as updates:
            async for update in updates:
                yield 0, update
        return
    with service.limits.calls(caller.tenant, len(requests)) as admitted:
        async with aclosing(merged(service, caller, requests, admitted)) as pieces:
            async for piece in pieces:
                yield piece


async def merged(
    service: Service, caller: Caller, requests: Sequence[GenerateRequest], admitted: Sequence[AdmittedCall]
) -> AsyncGenerator[Piece, None]:
    """What comes of requests that were let in, as it comes."""
    came: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

    async def follow(index: int, request: GenerateRequest) -> None:
        try:
            running = updates_of(service, caller, request, Meter(), admitted=admitted[index])
            async with aclosing(running) as updates:
                async for update in updates:
                    came.put_nowait((index, update))
        except MlxMcpError as error:
            came.put_nowait(error)

    tasks = [asyncio.create_task(follow(index, request)) for index, request in enumerate(requests)]
    try:
        running = len(tasks)
        while running:
            piece = await came.get()
            if isinstance(piece, BaseException):
                raise piece
            running -= isinstance(piece[1], Result)
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def forked(service: Service, caller: Caller, session: str, name: str = "") -> AsyncIterator[str]:
    """The handle of a new session that goes on from another one; it is closed again if the block fails.

    Raises:
        MlxMcpError: see `fork_session`.
    """
    forking = asyncio.create_task(fork_session(service, caller, session, 1, (name,) if name else (), ""))
    try:
        [fork] = await asyncio.shield(forking)  # a call that is cancelled meanwhile must know what to close
        yield fork.session_id
    except BaseException:
        with anyio.CancelScope(shield=True), suppress(MlxMcpError):
            [fork] = await forking
            await service.engine.close_sessions(caller.tenant, (fork.session_id,))
        raise


@asynccontextmanager
async def closed_unless_whole(service: Service, caller: Caller, name: str) -> AsyncIterator[None]:
    """Close the session that was to be opened under a name, if the block fails: nobody knows of it then.

    The name must be a new one, which no other session can have.
    """
    try:
        yield
    except BaseException:
        with anyio.CancelScope(shield=True), suppress(MlxMcpError):
            await service.engine.close_sessions(caller.tenant, (name,))
        raise
