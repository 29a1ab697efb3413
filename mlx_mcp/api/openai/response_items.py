"""The input of a response → messages as the service has them, and as it is shown again. Pure."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mlx_mcp.api.openai.messages import ROLES, called_by, content_of
from mlx_mcp.api.openai.shared_shapes import Json
from mlx_mcp.chat.message import Image, Message, Text, ToolCall
from mlx_mcp.errors import InvalidRequest

SPEAKERS = ("system", "developer", "user", "assistant")


def input_messages(given: str | list[Json], before: Sequence[Message] = ()) -> tuple[Message, ...]:
    """The messages of an input; `before` are those of the responses that it goes on from.

    What a model said comes in several items, which are one message: thoughts, text and calls.

    Raises:
        InvalidRequest: an item is none that can be told to a model.
    """
    if isinstance(given, str):
        return (Message("user", given),)
    reading = Reading({call.call_id: call.name for message in before for call in message.tool_calls})
    for item in given:
        reading.take(item)
    reading.close()
    return tuple(reading.messages)


class Reading:
    """Reads items in their order."""

    def __init__(self, names: dict[str, str]) -> None:
        """`names` are those of the functions that were called, by the calls' ids."""
        self.messages: list[Message] = []
        self._names = names
        self._thoughts: list[str] = []  # of the model's message that is being read, as the next two
        self._said: list[Text | Image] = []
        self._calls: list[ToolCall] = []

    def take(self, item: Json) -> None:
        """Take an item.

        Raises:
            InvalidRequest: it is none that can be told to a model.
        """
        match item.get("type", "message"), item:
            case "message", {"role": "assistant", "content": content}:
                if self._calls:
                    self.close()
                self._said += parts_of(content)
            case "message", {"role": str(role), "content": content} if role in SPEAKERS:
                self.close()
                told = content if isinstance(content, str) else parts_of(content)
                self.messages.append(Message(ROLES.get(role, role), told))
            case "reasoning", _:
                if self._said or self._calls:
                    self.close()
                self._thoughts += [part.text for part in parts_of(item.get("content") or item.get("summary") or [])]
            case "function_call", {"name": str(name), "arguments": str(arguments)} if name:
                self._calls.append(ToolCall(name, arguments_of(arguments), str(item.get("call_id") or "")))
                self._names[self._calls[-1].call_id] = name
            case "function_call_output", {"call_id": str(call_id), "output": output}:
                self.close()
                told = output if isinstance(output, str) else parts_of(output)
                name = called_by(call_id, self._names)
                self.messages.append(Message("tool", told, call_id=call_id, name=name))
            case kind, _:
                raise InvalidRequest(
                    f"An item of the input, of type {str(kind)[:40]!r}, cannot be told to a model here. Send messages, "
                    "function_call, function_call_output and reasoning, each with all its members."
                )

    def close(self) -> None:
        """End the model's message that is being read, if there is one."""
        if self._thoughts or self._said or self._calls:
            thoughts, said, calls = "".join(self._thoughts), tuple(self._said), tuple(self._calls)
            self.messages.append(Message("assistant", said, thoughts, calls))
        self._thoughts, self._said, self._calls = [], [], []


def parts_of(content: Any) -> tuple[Any, ...]:
    """The parts of a content; a text is one part.

    Raises:
        InvalidRequest: there is one that cannot be told to a model.
    """
    if isinstance(content, str):
        return (Text(content),)
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InvalidRequest("The content of an item must be a text or a list of parts; write it so.")
    parts = content_of(content)
    assert not isinstance(parts, str), "a list has parts"
    return parts


def arguments_of(text: str) -> dict[str, Any]:
    """The arguments of a call.

    Raises:
        InvalidRequest: they are no JSON object.
    """
    with suppress(ValueError, RecursionError):
        arguments = json.loads(text or "{}")
        if isinstance(arguments, dict):
            return arguments
    raise InvalidRequest("The `arguments` of a function_call are no JSON object: send them as they came.")


def shown_items(given: str | list[Json]) -> list[Json]:
    """An input as it is shown again: each item with its type and an id."""
    items: list[Json] = [{"role": "user", "content": given}] if isinstance(given, str) else given
    shown = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message" and isinstance(item.get("content"), str):
            text = "output_text" if item.get("role") == "assistant" else "input_text"
            item = item | {"content": [{"type": text, "text": item["content"]}]}
        shown.append({"id": f"{kind[:4]}_{secrets.token_hex(12)}", "type": kind, "status": "completed"} | item)
    return shown
