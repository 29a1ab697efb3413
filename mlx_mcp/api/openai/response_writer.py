"""What the service returns → a response and its events, in their order. Pure."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mlx_mcp.api.openai.chat_answer import arguments_of, calls_of
from mlx_mcp.api.openai.counts import Thinking, reused
from mlx_mcp.api.openai.errors import error_in_stream
from mlx_mcp.api.openai.messages import call_id_of
from mlx_mcp.api.openai.response_shapes import (
    CallItem,
    Incomplete,
    InputDetails,
    Item,
    ItemStatus,
    MessageItem,
    OutputDetails,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseAnswer,
    ResponseError,
    ResponseEvent,
    ResponseUsage,
    Status,
)
from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.errors import MlxMcpError
from mlx_mcp.service.values import Delta, Result

NAMES = {TextKind.ANSWER: "output_text", TextKind.REASONING: "reasoning_text"}
IDS = {TextKind.ANSWER: "msg", TextKind.REASONING: "rs"}


class OpenItem:
    """A message or thoughts that are being written."""

    def __init__(self, kind: TextKind) -> None:
        self.kind, self.id, self.texts = kind, new_id(IDS[kind]), list[str]()

    @property
    def part(self) -> OutputText | ReasoningText:
        """Its content so far."""
        text = "".join(self.texts)
        return OutputText(text=text) if self.kind is TextKind.ANSWER else ReasoningText(text=text)

    def item(self, status: ItemStatus) -> Item:
        """The item as it is now; its content is there once it has been begun."""
        content: list[Any] = [] if status == "in_progress" else [self.part]
        if self.kind is TextKind.ANSWER:
            return MessageItem(id=self.id, status=status, content=content)
        return ReasoningItem(id=self.id, status=status, content=content)


class ResponseWriter:
    """Writes one response. Its events need not be sent: whoever takes them all has the whole of it in `response`."""

    def __init__(self, response: ResponseAnswer, parallel: bool, namespaces: Mapping[str, str]) -> None:
        """`response` has all but the answer; `namespaces` are those of functions, by name."""
        self.response, self._parallel, self._namespaces = response, parallel, namespaces
        self.thinking = Thinking()
        self._open: OpenItem | None = None
        self._num_events = 0
        self._result: Result | None = None
        self._calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> Message:
        """What the model said."""
        assert self._result is not None, "the answer is whole"
        return Message("assistant", self._result.text, self._result.reasoning, self._calls)

    def opening(self) -> Iterator[ResponseEvent]:
        """The events before the answer."""
        self.response.status = "in_progress"
        yield self._event("response.created", response=self._as_now())
        yield self._event("response.in_progress", response=self._as_now())

    def text(self, new: Delta) -> Iterator[ResponseEvent]:
        """The events of new text; a part of a call has none, since calls come whole at the end."""
        self.thinking.take(new)
        if new.kind is TextKind.TOOL_CALL:
            return
        if self._open is None or self._open.kind is not new.kind:
            yield from self._close("completed")
            yield from self._begin(new.kind)
        assert self._open is not None, "text belongs to an item"
        self._open.texts.append(new.text)
        more: dict[str, Any] = {"logprobs": []} if new.kind is TextKind.ANSWER else {}
        yield self._of_part(f"response.{NAMES[new.kind]}.delta", delta=new.text, **more)

    def ending(self, result: Result, note: str = "") -> Iterator[ResponseEvent]:
        """The last events: the end of the text, the calls, and the whole response."""
        self._result, cut = result, result.finish_reason == "length"
        if not self.response.output and self._open is None and not result.tool_calls:
            yield from self._begin(TextKind.ANSWER)  # an answer without any text
        yield from self._close("incomplete" if cut else "completed")
        self._calls = tuple(replace(c, call_id=call_id_of(c)) for c in calls_of(result, self._parallel))
        for call in self._calls:
            yield from self._call(call)
        self._end("incomplete" if cut else "completed")
        if cut:
            self.response.incomplete_details = Incomplete()
        else:
            self.response.completed_at = int(time.time())
        self.response.model = result.model
        self.response.usage = usage_of(result, self.thinking)
        if result.session is not None:
            self.response.session_id = result.session.session_id
        notes = " ".join(filter(None, (note, *result.notes)))
        if notes:
            self.response.note = notes
        yield self._event(f"response.{self.response.status}", response=self.response)

    def failing(self, error: MlxMcpError) -> Iterator[ResponseEvent]:
        """The last events of a response that broke off: the SDKs raise at the first, and look at the second."""
        told = error_in_stream(error).error
        self.fail(error)
        yield self._event("error", code=told.code, message=told.message, param=told.param, error=told)
        yield self._event("response.failed", response=self.response)

    def fail(self, error: MlxMcpError) -> None:
        """Note why there is no answer."""
        told = error_in_stream(error).error
        self._end("failed")
        self.response.error = ResponseError(code=told.code or "server_error", message=told.message)

    def cancel(self) -> None:
        """Note that it was cancelled."""
        self._end("cancelled")

    def _end(self, status: Status) -> None:
        self.response.status = status

    def _begin(self, kind: TextKind) -> Iterator[ResponseEvent]:
        self._open = OpenItem(kind)
        item = self._open.item("in_progress")
        yield self._event("response.output_item.added", output_index=len(self.response.output), item=item)
        yield self._of_part("response.content_part.added", part=self._open.part)

    def _close(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        if self._open is None:
            return
        part, item = self._open.part, self._open.item(status)
        more: dict[str, Any] = {"logprobs": []} if self._open.kind is TextKind.ANSWER else {}
        yield self._of_part(f"response.{NAMES[self._open.kind]}.done", text=part.text, **more)
        yield self._of_part("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=len(self.response.output), item=item)
        self.response.output.append(item)
        self._open = None

    def _call(self, call: ToolCall) -> Iterator[ResponseEvent]:
        item_id, index, arguments = new_id("fc"), len(self.response.output), arguments_of(call)
        given: dict[str, Any] = {"id": item_id, "call_id": call.call_id, "name": call.name}
        if call.name in self._namespaces:
            given["namespace"] = self._namespaces[call.name]
        begun = CallItem(**given, arguments="", status="in_progress")
        done = CallItem(**given, arguments=arguments, status="completed")
        yield self._event("response.output_item.added", output_index=index, item=begun)
        where: dict[str, Any] = {"output_index": index, "item_id": item_id}
        yield self._event("response.function_call_arguments.delta", **where, delta=arguments)
        yield self._event("response.function_call_arguments.done", **where, name=call.name, arguments=arguments)
        yield self._event("response.output_item.done", output_index=index, item=done)
        self.response.output.append(done)

    def _of_part(self, kind: str, **members: Any) -> ResponseEvent:
        assert self._open is not None, "the part is being written"
        where = {"item_id": self._open.id, "output_index": len(self.response.output), "content_index": 0}
        return self._event(kind, **where, **members)

    def _event(self, kind: str, **members: Any) -> ResponseEvent:
        self._num_events += 1
        return ResponseEvent(type=kind, sequence_number=self._num_events - 1, **members)

    def _as_now(self) -> ResponseAnswer:
        return self.response.model_copy(update={"output": list(self.response.output)})


def usage_of(result: Result, thinking: Thinking) -> ResponseUsage:
    """What a response took."""
    return ResponseUsage(
        input_tokens=result.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=reused(result)),
        output_tokens=result.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=thinking.num_tokens),
        total_tokens=result.prompt_tokens + result.completion_tokens,
    )


def new_id(prefix: str) -> str:
    """An id of an item."""
    return f"{prefix}_{secrets.token_hex(16)}"
