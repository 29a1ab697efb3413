"""POST /v1/responses: a response is a session, and the next one goes on in a fork of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing
from itertools import chain

from starlette.responses import Response

from mlx_mcp.api.openai.head import Head, head_of
from mlx_mcp.api.openai.options import namespaces_of
from mlx_mcp.api.openai.response_items import shown_items
from mlx_mcp.api.openai.response_shapes import ResponseAnswer, ResponseEvent, ResponseRequest
from mlx_mcp.api.openai.response_turn import Turn, turn_of
from mlx_mcp.api.openai.response_writer import ResponseWriter
from mlx_mcp.api.openai.shape import answer, event
from mlx_mcp.api.openai.streaming import Beginning
from mlx_mcp.api.web.endpoint import Asked
from mlx_mcp.api.web.events import stream
from mlx_mcp.errors import InvalidRequest, MlxMcpError
from mlx_mcp.service.activity import Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.models import note_of
from mlx_mcp.service.replies import Reply
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.service.several import Piece, closed_unless_whole, stream_answers
from mlx_mcp.service.storing import keep, make_room
from mlx_mcp.service.values import Delta, Result


async def create_response(asked: Asked) -> Response:
    """Answer an input, whole or as a stream, or in the background."""
    body: ResponseRequest = asked.body
    if body.background and (body.stream or not body.store):
        raise InvalidRequest("What runs in the background is fetched later: give store=true and stream=false with it.")
    head = head_of(asked, "resp_")
    previous = None
    if body.previous_response_id:
        known = known_sessions(asked.service)
        previous = asked.service.replies.get(asked.caller.tenant, body.previous_response_id, known)
        if not previous.session_id:
            raise InvalidRequest("The previous response is no answer to go on from: wait for it, or take another one.")
    making = Making(asked.service, asked.caller, body, head, turn_of(body, head.id, previous), previous)
    if body.background:
        return answer(await making.start())
    if body.stream:
        return await stream(making.events())
    await making.run()
    return answer(making.writer.response)


class Making:
    """The making of one response."""

    def __init__(
        self, service: Service, caller: Caller, body: ResponseRequest, head: Head, turn: Turn, previous: Reply | None
    ) -> None:
        self._service, self._caller, self._body, self._turn = service, caller, body, turn
        self._previous = previous
        self._note = note_of(service, turn.told.model)
        namespaces = namespaces_of(body.tools)
        self.writer = ResponseWriter(response_of(body, head, turn), body.parallel_tool_calls, namespaces)
        self._reply = Reply(
            head.id,
            caller.tenant,
            self.writer.response,
            shown_items(body.input),
            turn.told,
            turn.messages,
            0 if previous is None else previous.num_bytes,
        )

    async def start(self) -> ResponseAnswer:
        """Have it made by a job; returns it as it is before that."""
        self.writer.response.status = "queued"
        begun = self.writer.response.model_copy(deep=True)
        self._reply.job = self._service.jobs.start(self._caller.tenant, "responses", self._in_background)
        await keep(self._service, self._reply)
        return begun

    async def run(self) -> None:
        """Make it to its end."""
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                for _ in self._of(piece):
                    pass
        await self._kept()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream; an error before the first is raised."""
        beginning, last = Beginning(), b""
        async with aclosing(self._pieces()) as pieces:
            try:
                async for piece in pieces:
                    opening = self.writer.opening() if beginning.at(piece) else ()
                    told = b"".join(event(made, made.type) for made in chain(opening, self._of(piece)))
                    if isinstance(piece[1], Result):
                        last = told
                    elif told:  # what comes together is written at once
                        yield told
            except MlxMcpError as error:
                if not beginning.begun:
                    raise
                yield b"".join(event(made, made.type) for made in self.writer.failing(error))
                return
        await self._kept()  # before its last event: whoever has that may go on from it at once
        yield last

    async def _in_background(self, report: Report) -> None:
        try:
            self.writer.response.status = "in_progress"
            await self.run()
        except MlxMcpError as error:
            self.writer.fail(error)
        except asyncio.CancelledError:
            self.writer.cancel()
            raise

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        turn = self._turn
        async with AsyncExitStack() as stack:
            if self._body.store:
                await make_room(self._service, self._caller.tenant, self._previous)
                name = turn.options.opening.name
                await stack.enter_async_context(closed_unless_whole(self._service, self._caller, name))
            answers = stream_answers(self._service, self._caller, turn.context, 1, turn.options, turn.parent)
            pieces = await stack.enter_async_context(aclosing(answers))
            async for piece in pieces:
                yield piece

    def _of(self, piece: Piece) -> Iterator[ResponseEvent]:
        update = piece[1]
        if isinstance(update, Delta):
            yield from self.writer.text(update)
        elif isinstance(update, Result):
            yield from self.writer.ending(update, self._note)

    async def _kept(self) -> None:
        """Keep the response that is whole, if it shall be stored."""
        if self._body.store:
            response = self.writer.response
            assert response.session_id, "a stored response is a session"
            self._reply.session_id = response.session_id
            self._reply.messages += (self.writer.message,)
            self._reply.num_bytes += len(response.model_dump_json()) + len(str(self._reply.given))
            await keep(self._service, self._reply)


def response_of(body: ResponseRequest, head: Head, turn: Turn) -> ResponseAnswer:
    """A response before its answer."""
    told = turn.told
    tools = [{"type": "function", **tool["function"]} for tool in told.tools if isinstance(tool["function"], dict)]
    return ResponseAnswer(
        id=head.id,
        created_at=head.created,
        status="in_progress",
        background=body.background,
        error=None,
        incomplete_details=None,
        instructions=told.instructions or None,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata,
        model=told.model or head.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls,
        previous_response_id=body.previous_response_id or None,
        reasoning={"effort": body.reasoning.effort, "summary": body.reasoning.summary},
        store=body.store,
        temperature=body.temperature,
        text={"format": body.text.format or {"type": "text"}},
        tool_choice=body.tool_choice,
        tools=tools,
        top_p=body.top_p,
        usage=None,
    )
