"""What completions without a chat take and give."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mlx_mcp.api.openai.shape import Given
from mlx_mcp.api.openai.shared_shapes import ErrorBody, StreamOptions, TokenSampling, Usage


class CompletionRequest(TokenSampling):
    """The body of a completion."""

    prompt: str | list[str] | list[int] | list[list[int]]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    n: Annotated[int, Field(ge=1, le=64)] = 1
    best_of: int | None = None
    max_tokens: int = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str = ""


class TextLogprobs(Given):
    """The log-probabilities of an answer's tokens, and where in the text each begins, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Given):
    """One of the answers, or what is new of it."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: TextLogprobs | None = None


class Completion(Given):
    """The answers, or the data of an event: what is new of them, or why no more will come."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    note: str | None = None
    error: ErrorBody | None = None
