"""What can be sent: messages, tools and how to answer.

Anthropic's API grows, and its clients send what is new unasked. So fields and kinds that are not known here are taken,
and counted (see translate): a shape says what is looked at.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Taken(BaseModel):
    """A part of a request; fields that it does not name are in `model_extra`."""

    model_config = ConfigDict(extra="allow")


class Source(Taken):
    """Where the content of a picture or a document is: "base64", "text" and "content" hold it, others point to it."""

    type: str
    media_type: str | None = None
    data: str | None = None
    content: str | list[Block] | None = None


class Block(Taken):
    """A part of a message; `type` says which of the fields it has.

    text, thinking, redacted_thinking, tool_use, tool_result, image, document, search_result and tool_reference are
    looked at.
    """

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    tool_name: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    source: Source | str | None = None
    title: str | None = None
    context: str | None = None


class InputMessage(Taken):
    """One turn; one of the role "system" stays where it is."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Taken):
    """A tool that the model may call. Tools that Anthropic's own servers run are left out."""

    name: str | None = None
    type: str | None = None  # None or "custom" is a tool of the client's
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    defer_loading: bool | None = None  # the model is told of it once a result refers to it


class ToolChoice(Taken):
    """Whether the model has to call a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None  # of several calls only the first is returned


class Thinking(Taken):
    """Whether the model thinks before it answers: "enabled", "disabled", or "adaptive", as the model likes."""

    type: str
    budget_tokens: int | None = Field(default=None, ge=0)


class OutputFormat(Taken):
    """What the text of the answer has to be: JSON that obeys a schema."""

    type: str
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class OutputConfig(Taken):
    """How much the model shall think, and what its text has to be."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(Taken):
    """What the model is told."""

    model: str = ""
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None


class MessagesRequest(CountRequest):
    """What the model is told, and how it is to answer."""

    max_tokens: int | None = Field(default=None, ge=0)  # 0 computes the prompt, and nothing is said
    stream: bool | None = None
    stop_sequences: list[str] | None = Field(default=None, max_length=64)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
