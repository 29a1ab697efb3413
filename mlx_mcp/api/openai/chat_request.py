"""A request for a chat completion → what the service takes. Pure."""

from __future__ import annotations

from mlx_mcp.api.openai.chat_shapes import ChatRequest
from mlx_mcp.api.openai.messages import messages_of
from mlx_mcp.api.openai.options import choice_of, function_of, grammar_of, reasoning_of, sampling_of
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options


def context_of(body: ChatRequest) -> Context:
    """What the model is told.

    Raises:
        InvalidRequest: a message cannot be told to a model.
    """
    return Context(messages=messages_of(body.messages))


def options_of(body: ChatRequest) -> Options:
    """How it is to be answered.

    Raises:
        InvalidRequest: it cannot be answered so.
    """
    if body.functions:
        raise InvalidRequest("`functions` is what came before tools: give them as `tools`.")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("`top_logprobs` goes with logprobs: set logprobs=true, or leave it out.")
    if body.session_id and body.parent_session_id:
        raise InvalidRequest("`session_id` and `parent_session_id` are two ways to go on: give one of them, not both.")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return Options(
        model=body.model,
        session=body.session_id or (body.parent_session_id if body.keep is False else ""),
        keep=body.keep,
        tools=tuple(function_of(tool, nested=True) for tool in body.tools),
        grammar=grammar_of(body.response_format, nested=True),
        reasoning=reasoning_of(body.reasoning_effort),
        sampling=sampling_of(body, max_tokens, body.top_logprobs if body.logprobs else None),
        tool_choice=choice_of(body.tool_choice),
        shorten=True,
    )


def parent_of(body: ChatRequest) -> str:
    """The session in a fork of which the answer is kept; empty if there is none, or nothing is to be kept."""
    return "" if body.keep is False else body.parent_session_id
