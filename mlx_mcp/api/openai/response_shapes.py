"""What responses take and give."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_mcp.api.openai.shape import Given, Taken
from mlx_mcp.api.openai.shared_shapes import Effort, ErrorBody, Json, SamplingTaken

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class TextConfig(Taken):
    """What form the answer has."""

    format: Json = Field(default_factory=dict)


class ReasoningConfig(Taken):
    """How long the model shall think."""

    effort: Effort | None = None
    summary: str | None = None


class ResponseRequest(SamplingTaken):
    """The body of a response."""

    input: str | list[Json] = Field(default_factory=list)
    model: str = ""
    instructions: str | None = None
    previous_response_id: str = ""
    tools: Annotated[list[Json], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: str | Json = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = Field(default_factory=TextConfig)
    reasoning: ReasoningConfig = Field(default_factory=ReasoningConfig)
    max_output_tokens: int | None = None
    stream: bool = False
    store: bool = True
    background: bool = False
    metadata: Json = Field(default_factory=dict)
    conversation: Any = None
    prompt: Any = None


class OutputText(Given):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Json] = Field(default_factory=list)
    logprobs: list[Json] = Field(default_factory=list)


class ReasoningText(Given):
    """What the model was thinking."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class MessageItem(Given):
    """A message of the model."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class ReasoningItem(Given):
    """Thoughts of the model, whole; there are no summaries of them."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    status: ItemStatus
    summary: list[Json] = Field(default_factory=list)
    content: list[ReasoningText]


class CallItem(Given):
    """A call that the model asks for; the arguments are JSON as text."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str
    status: ItemStatus


Item = MessageItem | ReasoningItem | CallItem


class InputDetails(Given):
    """Of the input's tokens: those whose keys and values were in memory or came from disk."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Given):
    """Of the output's tokens: those that were written while the model was thinking."""

    reasoning_tokens: int


class ResponseUsage(Given):
    """What a response took, in tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(Given):
    """Why a response failed."""

    code: str
    message: str


class Incomplete(Given):
    """Why a response ends where it does."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseAnswer(Given):
    """A response. Beside OpenAI's members: the session that it is, and what the caller should know."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: bool
    completed_at: int | None = None
    error: ResponseError | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: Json
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: Json
    store: bool
    temperature: float | None
    text: Json
    tool_choice: str | Json
    tools: list[Json]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None
    session_id: str | None = None
    note: str | None = None


class ResponseEvent(Given):
    """The data of an event; which members it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseAnswer | None = None
    output_index: int | None = None
    item: Item | None = None
    item_id: str | None = None
    content_index: int | None = None
    part: OutputText | ReasoningText | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[Json] | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None
    error: ErrorBody | None = None


class ItemsQuery(Taken):
    """Which of the items are listed."""

    limit: Annotated[int, Field(ge=1, le=100, description="How many at most.")] = 20
    order: Annotated[Literal["asc", "desc"], Field(description="desc: the latest first.")] = "desc"
    after: Annotated[str, Field(description="List those that come after the item of this id.")] = ""


class InputItems(Given):
    """What was new in the request for a response."""

    object: Literal["list"] = "list"
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Given):
    """That a response was deleted, and its session closed."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
