"""Shapes that several endpoints have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_mcp.api.openai.shape import Given, Taken

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Stop = str | Annotated[list[str], Field(max_length=16)]
LogitBias = Annotated[dict[int, float], Field(max_length=1024)]


class SamplingTaken(Taken):
    """How an answer is drawn, by the names that several endpoints have for it; the last three are vLLM's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class TokenSampling(SamplingTaken):
    """What chat completions and completions have beside that."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBias = Field(default_factory=dict)
    seed: int | None = None
    stop: Stop = Field(default_factory=list)


class StreamOptions(Taken):
    """What a stream has beside the answer."""

    include_usage: bool = False


class PromptDetails(Given):
    """Of the prompt's tokens: those whose keys and values were in memory or came from disk."""

    cached_tokens: int


class CompletionDetails(Given):
    """Of the answer's tokens: those that were written while the model was thinking."""

    reasoning_tokens: int


class Usage(Given):
    """What an answer took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ErrorBody(Given):
    """Why there is no answer."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Given):
    """The body of every answer that is none; in a stream, the data of the last event."""

    error: ErrorBody


Json = dict[str, Any]
