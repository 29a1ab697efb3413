"""What the service returns → the answers of chat completions, whole and in chunks. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TypeVar

from mlx_mcp.api.openai.chat_shapes import (
    Call,
    CallDelta,
    CalledFunction,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    Delta,
    FinishReason,
    LikelyToken,
    Logprobs,
    Said,
    TopToken,
)
from mlx_mcp.api.openai.head import Head
from mlx_mcp.api.openai.messages import call_id_of
from mlx_mcp.api.openai.shape import MARK, Template
from mlx_mcp.api.openai.shared_shapes import Usage
from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.message import ToolCall
from mlx_mcp.service.values import Delta as NewText
from mlx_mcp.service.values import Result, TokenChoice

T = TypeVar("T", ChatCompletion, ChatChunk)
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}
HALF = "\ufffd"  # stands for a part of a character


def calls_of(result: Result, parallel: bool) -> Sequence[ToolCall]:
    """The calls that the model asks for: the first alone if the client takes no more than one."""
    return result.tool_calls if parallel else result.tool_calls[:1]


def arguments_of(call: ToolCall) -> str:
    """The arguments of a call, as JSON."""
    return json.dumps(call.arguments, ensure_ascii=False)


def logprobs_of(result: Result, asked: bool) -> Logprobs | None:
    """The log-probabilities of an answer's tokens, if they were asked for."""
    return Logprobs(content=list(map(likely, result.logprobs))) if asked else None


def likely(choice: TokenChoice) -> LikelyToken:
    """A token, and the likeliest ones in its place."""
    tops = [TopToken(token=text, logprob=logprob, bytes=bytes_of(text)) for _, text, logprob in choice.top]
    return LikelyToken(token=choice.text, logprob=choice.logprob, bytes=bytes_of(choice.text), top_logprobs=tops)


def bytes_of(text: str) -> list[int] | None:
    """The bytes of a token; None if it is a part of a character."""
    return None if HALF in text else list(text.encode(errors="surrogatepass"))


def completion(
    head: Head, results: Sequence[Result], usage: Usage, logprobs: bool = False, parallel: bool = True, note: str = ""
) -> ChatCompletion:
    """The answers, whole."""
    choices = [
        Choice(
            index=index,
            message=said(result, parallel),
            finish_reason=REASONS[result.finish_reason],
            logprobs=logprobs_of(result, logprobs),
        )
        for index, result in enumerate(results)
    ]
    made = ChatCompletion(id=head.id, created=head.created, model=results[0].model, choices=choices, usage=usage)
    return with_more(made, results, note)


def said(result: Result, parallel: bool) -> Said:
    """The model's message; one that is nothing but calls has no content."""
    calls = [
        Call(id=call_id_of(call), function=CalledFunction(name=call.name, arguments=arguments_of(call)))
        for call in calls_of(result, parallel)
    ]
    made = Said(content=None if calls and not result.text else result.text, refusal=None)
    if result.reasoning:
        made.reasoning_content = made.reasoning = result.reasoning
    if calls:
        made.tool_calls = calls
    return made


class Chunks:
    """The chunks of a stream of answers."""

    def __init__(self, head: Head, logprobs: bool, parallel: bool, usage: bool) -> None:
        """`usage` says that the last chunk has it; then all others have null in its place."""
        self._head, self._logprobs, self._parallel, self._usage = head, logprobs, parallel, usage
        self._templates: dict[tuple[int, TextKind], Template] = {}

    def opening(self, index: int) -> ChatChunk:
        """The first chunk of an answer. Clients count answers by these, so that they must come in order."""
        return self._chunk(index, Delta(role="assistant", content=""))

    def text(self, index: int, new: NewText) -> bytes | None:
        """The event of new text; None if it is a part of a call, which comes whole at the end."""
        if new.kind is TextKind.TOOL_CALL:
            return None
        template = self._templates.get((index, new.kind))
        if template is None:
            thought = new.kind is TextKind.REASONING
            delta = Delta(reasoning_content=MARK, reasoning=MARK) if thought else Delta(content=MARK)
            template = self._templates[index, new.kind] = Template(self._chunk(index, delta))
        return template.event(new.text)

    def ending(self, index: int, result: Result, note: str = "") -> Iterator[ChatChunk]:
        """The last chunks of an answer: its calls, each in two, and why it ended."""
        for number, call in enumerate(calls_of(result, self._parallel)):
            begun = CalledFunction(name=call.name, arguments="")
            first = CallDelta(index=number, id=call_id_of(call), type="function", function=begun)
            yield self._chunk(index, Delta(tool_calls=[first]))
            rest = CallDelta(index=number, function=CalledFunction(arguments=arguments_of(call)))
            yield self._chunk(index, Delta(tool_calls=[rest]))
        last = self._chunk(index, Delta(), REASONS[result.finish_reason])
        if self._logprobs:
            last.choices[0].logprobs = logprobs_of(result, asked=True)
        yield with_more(last, [result], note)

    def usage(self, usage: Usage) -> ChatChunk:
        """The chunk after all others, if the client asked for it."""
        return ChatChunk(id=self._head.id, created=self._head.created, model=self._head.model, choices=[], usage=usage)

    def _chunk(self, index: int, delta: Delta, reason: FinishReason | None = None) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, finish_reason=reason)
        made = ChatChunk(id=self._head.id, created=self._head.created, model=self._head.model, choices=[choice])
        if self._usage:
            made.usage = None  # set, so that it is sent
        return made


def with_more(made: T, results: Sequence[Result], note: str) -> T:
    """The answer with what OpenAI's has no member for: its session, and what the caller should know."""
    session = results[0].session
    if session is not None:
        made.session_id = session.session_id
    notes = " ".join(dict.fromkeys(filter(None, (note, *(each for result in results for each in result.notes)))))
    if notes:
        made.note = notes
    return made
