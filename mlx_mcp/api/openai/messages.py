"""Messages in OpenAI's form → messages as the service has them. Pure."""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mlx_mcp.api.openai.chat_shapes import TakenMessage
from mlx_mcp.api.openai.shared_shapes import Json
from mlx_mcp.chat.message import Image, Message, Text, ToolCall
from mlx_mcp.errors import InvalidRequest

ROLES = {"developer": "system", "function": "tool"}
TEXTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text")
IMAGES = ("image_url", "input_image")
DATA_URL = re.compile(r"data:(image/[\w.+-]+);base64,(.*)", re.DOTALL)
OWN_CALL_ID = re.compile(r"call_[0-9a-f]{12}_(.+)", re.DOTALL)


def messages_of(taken: Sequence[TakenMessage]) -> tuple[Message, ...]:
    """The messages of a chat.

    Raises:
        InvalidRequest: a part of one cannot be told to a model, a call is none, or a result is of no call.
    """
    names: dict[str, str] = {}  # the functions that were called, by the calls' ids
    messages = []
    for each in taken:
        calls = tuple(map(called, each.tool_calls))
        names |= {call.call_id: call.name for call in calls}
        role = ROLES.get(each.role, each.role)
        name = each.name if role == "tool" else ""  # others' names are no part of what is said
        if role == "tool" and not name:
            name = called_by(each.tool_call_id, names)
        reasoning = each.reasoning_content or each.reasoning
        messages.append(Message(role, content_of(each.content), reasoning, calls, each.tool_call_id, name))
    return tuple(messages)


def content_of(content: str | list[Json]) -> str | tuple[Text | Image, ...]:
    """The content of a message.

    Raises:
        InvalidRequest: a part of it is neither text nor a picture.
    """
    return content if isinstance(content, str) else tuple(map(part_of, content))


def part_of(part: Json) -> Text | Image:
    """A part of a message's content; the model that gets it says whether it can see.

    Raises:
        InvalidRequest: it is neither text nor a picture.
    """
    kind = part.get("type")
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind in (*TEXTS, "refusal") and isinstance(text, str):
        return Text(text)
    if kind in IMAGES:
        given = part.get("image_url")
        return image_of(given.get("url") if isinstance(given, dict) else given)
    raise InvalidRequest(
        f"A part of a message of type {str(kind)[:40]!r} cannot be told to a model here. Send what it says as text: "
        '{"type": "text", "text": …}.'
    )


def image_of(url: Any) -> Image:
    """The picture of a data URL; of another address nothing is fetched, and the picture is empty."""
    found = DATA_URL.fullmatch(url) if isinstance(url, str) else None
    if found is not None:
        with suppress(binascii.Error, ValueError):
            return Image(base64.b64decode(found[2], validate=True), found[1])
    return Image(b"", "image/unknown")


def called(given: Json) -> ToolCall:
    """A call that the model had asked for.

    Raises:
        InvalidRequest: it is none.
    """
    match given:
        case {"function": {"name": str(name), "arguments": str() | dict() as arguments}} if name:
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
            if isinstance(arguments, dict):
                return ToolCall(name, arguments, str(given.get("id") or ""))
    raise InvalidRequest(
        "One of `tool_calls` is no call of a function with arguments in JSON. Send it as it came: "
        '{"id": …, "type": "function", "function": {"name": …, "arguments": "{…}"}}.'
    )


def called_by(call_id: str, names: dict[str, str]) -> str:
    """The function that a result is of, by the id of its call.

    Ids that were made here have the name in them, since the turns of a session do not repeat the calls before.

    Raises:
        InvalidRequest: no call has that id.
    """
    own = OWN_CALL_ID.fullmatch(call_id)
    name = names.get(call_id) or (own[1] if own else "")
    if not name:
        raise InvalidRequest(
            f"A tool's result is of call {call_id[:80]!r}, and no message before it has that call. Send the "
            "assistant's message with its `tool_calls` before it, or give the function's `name`."
        )
    return name


def call_id_of(call: ToolCall) -> str:
    """The id of a call: the model's own, or else a new one that has the function's name in it."""
    return call.call_id or f"call_{secrets.token_hex(6)}_{call.name}"
