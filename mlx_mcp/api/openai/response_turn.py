"""A request for a response, and the one that it goes on from → what the service takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_mcp.api.openai.options import choice_of, functions_of, grammar_of, reasoning_of, sampling_of
from mlx_mcp.api.openai.response_items import input_messages
from mlx_mcp.api.openai.response_shapes import ResponseRequest
from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import NONE
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options
from mlx_mcp.service.replies import Reply
from mlx_mcp.service.values import SessionOptions


@dataclass(frozen=True)
class Told:
    """What a conversation begins with, and who answers: a session goes on only if these stay the same."""

    model: str
    instructions: str
    tools: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Turn:
    """What is asked of the service.

    `messages` are all of the conversation, in whatever session some of them are. With a `parent` the answer is kept in
    a fork of that session.
    """

    told: Told
    messages: tuple[Message, ...]
    context: Context
    options: Options
    parent: str = ""


def turn_of(body: ResponseRequest, reply_id: str, previous: Reply | None) -> Turn:
    """What is asked of the service for a response that will have this id.

    It goes on in a fork of the previous one's session if model, instructions and tools are the same, or are left out.
    Otherwise, and where messages come that a turn cannot begin with, the whole conversation is told anew.

    Raises:
        InvalidRequest: it cannot be asked for.
    """
    if body.conversation is not None or body.prompt is not None:
        raise InvalidRequest(
            "Conversations and prompts are not stored here: leave out `conversation` and `prompt`, send the text, and "
            "go on with `previous_response_id`."
        )
    tools = functions_of(body.tools)
    options = replace(options_of(body), tools=tools, opening=SessionOptions(reply_id, ephemeral=True))
    if previous is None:
        told = Told(body.model, body.instructions or "", tools)
        return anew(told, input_messages(body.input), options)
    before: Told = previous.told
    new = input_messages(body.input, previous.messages)
    instructions = before.instructions if body.instructions is None else body.instructions
    told = Told(body.model or before.model, instructions, tools or before.tools)
    if told != before or not goes_on(new):
        earlier = tuple(m for i, m in enumerate(previous.messages) if i or m.role != "system")
        return anew(Told(told.model, instructions, tools), earlier + new, replace(options, model=told.model))
    choice = options.tool_choice if tools or not before.tools else NONE
    turn = replace(options, model="", tools=(), tool_choice=choice)
    whole, context = previous.messages + new, Context(messages=new)
    if body.store:
        return Turn(told, whole, context, turn, parent=previous.session_id)
    return Turn(told, whole, context, replace(turn, session=previous.session_id))


def anew(told: Told, messages: tuple[Message, ...], options: Options) -> Turn:
    """A conversation that is told from its beginning."""
    system = (Message("system", told.instructions),) if told.instructions else ()
    return Turn(told, system + messages, Context(messages=system + messages), options)


def goes_on(new: Sequence[Message]) -> bool:
    """Whether messages can be a turn of a session."""
    return bool(new) and new[0].role in ("user", "tool") and all(message.role != "system" for message in new)


def options_of(body: ResponseRequest) -> Options:
    """How it is to be answered.

    Raises:
        InvalidRequest: it cannot be answered so.
    """
    return Options(
        model=body.model,
        keep=body.store,
        grammar=grammar_of(body.text.format, nested=False),
        reasoning=reasoning_of(body.reasoning.effort),
        sampling=sampling_of(body, body.max_output_tokens),
        tool_choice=choice_of(body.tool_choice),
        shorten=True,
    )
