"""What chat completions take and give."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mlx_mcp.api.openai.shape import Given, Taken
from mlx_mcp.api.openai.shared_shapes import Effort, ErrorBody, Json, StreamOptions, TokenSampling, Usage

FinishReason = Literal["stop", "length", "tool_calls"]


class TakenMessage(Taken):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Json] = ""
    name: str = ""
    tool_calls: list[Json] = Field(default_factory=list)
    tool_call_id: str = ""
    reasoning_content: str = ""
    reasoning: str = ""


class ChatRequest(TokenSampling):
    """The body of a chat completion."""

    messages: Annotated[list[TakenMessage], Field(min_length=1)]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    n: Annotated[int, Field(ge=1, le=64)] = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: Annotated[list[Json], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: str | Json = "auto"
    parallel_tool_calls: bool = True
    functions: list[Json] = Field(default_factory=list)
    response_format: Json = Field(default_factory=dict)
    reasoning_effort: Effort | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    session_id: str = Field("", description="The messages are the next turn of this session.")
    parent_session_id: str = Field("", description="The same, in a fork of this session, which stays as it is.")
    keep: bool | None = Field(None, description="false leaves the session as it is; true without one opens one.")


class CalledFunction(Given):
    """A function that the model asks to be called; the arguments are JSON as text."""

    name: str | None = None
    arguments: str | None = None


class Call(Given):
    """A call that the model asks for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CallDelta(Given):
    """A part of a call: first its id and name, then its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class TopToken(Given):
    """A token that was likely; `bytes` is null where it is only a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class LikelyToken(TopToken):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TopToken]


class Logprobs(Given):
    """The log-probabilities of all tokens that the model wrote, those of thoughts and calls included."""

    content: list[LikelyToken]
    refusal: None = None


class Said(Given):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None


class Choice(Given):
    """One of the answers."""

    index: int
    message: Said
    finish_reason: FinishReason
    logprobs: Logprobs | None


class ChatCompletion(Given):
    """The answers. Beside OpenAI's members: the session that the answer is kept in, and what the caller should know."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    session_id: str | None = None
    note: str | None = None


class Delta(Given):
    """What is new of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(Given):
    """What is new of one of the answers."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: Logprobs | None = None


class ChatChunk(Given):
    """The data of an event: what is new, or why no more will come."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    session_id: str | None = None
    note: str | None = None
    error: ErrorBody | None = None
