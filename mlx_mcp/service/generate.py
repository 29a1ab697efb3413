"""Has one prompt answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import AUTO, Grammar, Reasoning
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine.requests import Delta, GenerateRequest, Progress, Result, Update
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context, chat
from mlx_mcp.service.limits import AdmittedCall
from mlx_mcp.service.models import note_of
from mlx_mcp.service.service import Service, known_sessions


@dataclass(frozen=True)
class Options:
    """How a context is to be answered.

    With a `session` the last message is its next turn, and it goes on with the answer unless `keep` is False; without
    one `keep` opens one, as `opening` says. `queue` waits for a turn of the session that is under way. Calls of one
    `lane` share a turn. `shorten` lowers max_tokens to what context and memory leave.
    """

    model: str = ""
    session: str = ""
    keep: bool | None = None
    queue: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    grammar: Grammar | None = None
    reasoning: Reasoning | None = None
    sampling: Sampling = field(default_factory=Sampling)
    tool_choice: str = AUTO
    opening: SessionOptions = field(default_factory=SessionOptions)
    lane: str = ""
    shorten: bool = False

    @property
    def keeps(self) -> bool:
        """Whether the answer is kept in a session."""
        return bool(self.session) if self.keep is None else self.keep


@dataclass(frozen=True)
class Answered:
    """An answer, and what the caller should know beside its own notes."""

    result: Result
    note: str = ""


async def generate(service: Service, caller: Caller, context: Context, options: Options, report: Report) -> Answered:
    """Answer a context.

    Raises:
        MlxMcpError: see EngineClient.generate; and InvalidRequest for files that cannot be read.
    """
    request = request_of(caller, await chat(caller, context), options)
    meter = Meter()
    result = await run(service, caller, request, meter, partial(report, [meter]))
    return Answered(result, note_of(service, options.model or options.session))


def request_of(caller: Caller, messages: tuple[Message, ...], options: Options, lane: str = "") -> GenerateRequest:
    """What the engine is asked for; calls of one `lane` share a turn."""
    return GenerateRequest(
        messages,
        options.model or None,
        options.sampling,
        lane=lane or options.lane,
        grammar=options.grammar,
        tools=options.tools,
        tool_choice=options.tool_choice,
        reasoning=options.reasoning,
        who=caller.who,
        tenant=caller.tenant,
        session=options.session,
        keep=options.keeps,
        queue=options.queue,
        opens=options.opening if options.keeps and not options.session else None,
        shorten=options.shorten,
    )


async def stream(
    service: Service, caller: Caller, context: Context, options: Options
) -> AsyncGenerator[Progress | Delta | Answered, None]:
    """Answer a context piece by piece: progress, text as it becomes certain, and last the whole answer.

    Close the generator to free its row.

    Raises:
        MlxMcpError: see `generate`.
    """
    request = request_of(caller, await chat(caller, context), options)
    async with aclosing(updates_of(service, caller, request, Meter())) as updates:
        async for update in updates:
            if isinstance(update, Result):
                yield Answered(update, note_of(service, options.model or options.session))
            else:
                yield update


async def run(
    service: Service,
    caller: Caller,
    request: GenerateRequest,
    meter: Meter,
    report: Callable[[], Awaitable[None]],
    admitted: AdmittedCall | None = None,
) -> Result:
    """Run a request to its end; a cancelled caller frees the row."""
    async with aclosing(updates_of(service, caller, request, meter, report, admitted)) as updates:
        async for update in updates:
            if isinstance(update, Result):
                return update
            await report()
    raise AssertionError("a generation ends with a result or an error")


async def updates_of(
    service: Service,
    caller: Caller,
    request: GenerateRequest,
    meter: Meter,
    report: Callable[[], Awaitable[None]] | None = None,
    admitted: AdmittedCall | None = None,
) -> AsyncGenerator[Update, None]:
    """What comes of a request, noted in the meter, up to the result.

    Awaits `report` while a warm context is computed. A request that was not `admitted` with others is admitted here.

    Raises:
        RateLimited: the caller's principal may not make it now.
        MlxMcpError: see EngineClient.generate.
    """
    limits = service.limits
    try:
        with (
            ExitStack() as holding,
            caller.activity.watching(meter),
            service.observer.watch(request, meter, service.engine.group) as watch,
        ):
            meter.line = f"computing the context {request.session} first"
            await service.warm.ready(service, caller, request.session, report)
            meter.line = ""
            if admitted is None:
                [admitted] = holding.enter_context(limits.calls(request.tenant))
            if request.opens is not None:
                holding.enter_context(limits.opening(request.tenant, 1, known_sessions(service).values()))
            if limits.weighs_memory(request.tenant) and (
                request.opens is not None or (request.session and request.keep)
            ):
                limits.check_memory(request.tenant, await service.engine.held_bytes(request.tenant))
            async with aclosing(service.engine.generate(request)) as updates:
                async for update in updates:
                    admitted.take(update)
                    if isinstance(update, Result):
                        if update.session is not None:
                            caller.activity.sessions.add(update.session.session_id)
                        service.warm.begin(service, caller, update.model)
                    else:
                        meter.take(update)
                    watch(update)
                    yield update
    finally:
        meter.ended = True
