"""What is returned: messages, their events, counts, models and errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class TextContent(BaseModel):
    """The model's text."""

    type: Literal["text"] = "text"
    text: str


class ThinkingContent(BaseModel):
    """The model's thoughts; `signature` is to be sent back with them, and nothing looks at it."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str


class ToolUseContent(BaseModel):
    """A call that the model asks for."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class Usage(BaseModel):
    """Tokens. The prompt's are those that were computed, `input_tokens`, and those that were there already.

    Of these some were in memory, and others came from disk. All that is computed is kept for a while, whether or not a
    caller marks it with cache_control, so that nothing is counted as written for later calls.
    """

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    output_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Answer(BaseModel):
    """A message of the model; `notes` are for whoever wonders about it, in whole sentences."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ThinkingContent | TextContent | ToolUseContent]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage
    notes: list[str] | None = None


class Event(BaseModel):
    """An event of a stream: its `type` says which of the fields it has.

    message_start, then for each part of the content content_block_start, content_block_delta and content_block_stop,
    then message_delta and message_stop. A ping may come anywhere after the first, and an error ends the stream.
    """

    type: Literal[
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]
    message: Answer | None = None
    index: int | None = None
    content_block: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    usage: Usage | None = None
    notes: list[str] | None = None
    error: ErrorDetail | None = None
    request_id: str | None = None


class TokenCount(BaseModel):
    """How many tokens a prompt has."""

    input_tokens: int


class ModelInfo(BaseModel):
    """A model that can be asked for. When it was made is not known, which Anthropic's API says by the year 1970."""

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str = "1970-01-01T00:00:00Z"
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class ModelPage(BaseModel):
    """Some of the models; more come after `last_id` if it `has_more`."""

    data: list[ModelInfo]
    has_more: bool
    first_id: str | None
    last_id: str | None


class ErrorDetail(BaseModel):
    """What kind of error it is, and what can be done."""

    type: str
    message: str


class ErrorBody(BaseModel):
    """The body of an answer that is an error."""

    type: Literal["error"] = "error"
    error: ErrorDetail
    request_id: str
