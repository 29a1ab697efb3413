"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator

from starlette.responses import Response

from mlx_mcp.api.openai.chat_answer import Chunks, completion
from mlx_mcp.api.openai.chat_request import context_of, options_of, parent_of
from mlx_mcp.api.openai.chat_shapes import ChatChunk, ChatRequest
from mlx_mcp.api.openai.collecting import collected
from mlx_mcp.api.openai.counts import Thinking, usage_of
from mlx_mcp.api.openai.head import Head, head_of
from mlx_mcp.api.openai.shape import answer, event
from mlx_mcp.api.openai.streaming import chunk_events
from mlx_mcp.api.web.endpoint import Asked
from mlx_mcp.api.web.events import stream
from mlx_mcp.service.models import note_of
from mlx_mcp.service.several import Piece, stream_answers
from mlx_mcp.service.values import Delta, Result


async def chat_completions(asked: Asked) -> Response:
    """Answer a chat, whole or as a stream."""
    body: ChatRequest = asked.body
    context, options = context_of(body), options_of(body)
    parent = parent_of(body)
    head, note = head_of(asked, "chatcmpl-"), note_of(asked.service, options.model or options.session or parent)
    pieces = stream_answers(asked.service, asked.caller, context, body.n, options, parent)
    if body.stream:
        return await stream(Streamed(body, head, note).events(pieces))
    results, thinking = await collected(pieces, body.n)
    return answer(completion(head, results, usage_of(results, thinking), body.logprobs, body.parallel_tool_calls, note))


class Streamed:
    """A stream of answers."""

    def __init__(self, body: ChatRequest, head: Head, note: str) -> None:
        usage = body.stream_options.include_usage
        self._chunks = Chunks(head, body.logprobs, body.parallel_tool_calls, usage)
        self._num, self._wants_usage, self._note = body.n, usage, note
        self._results: dict[int, Result] = {}
        self._thinking = [Thinking() for _ in range(body.n)]

    def events(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
        """Its events."""
        return chunk_events(pieces, self._opening, self._of, self._closing)

    def _opening(self) -> Iterator[ChatChunk]:
        return map(self._chunks.opening, range(self._num))

    def _of(self, piece: Piece) -> Iterator[bytes]:
        index, update = piece
        if isinstance(update, Delta):
            self._thinking[index].take(update)
            chunk = self._chunks.text(index, update)
            if chunk is not None:
                yield chunk
        elif isinstance(update, Result):
            self._results[index] = update
            yield from map(event, self._chunks.ending(index, update, self._note))

    def _closing(self) -> Iterator[ChatChunk]:
        if self._wants_usage:
            results = [self._results[index] for index in range(self._num)]
            yield self._chunks.usage(usage_of(results, self._thinking))
