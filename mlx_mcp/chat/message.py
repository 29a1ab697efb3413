"""The messages of a chat, with all that one can hold; and how a chat template sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """A part of a message that is text."""

    text: str


@dataclass(frozen=True)
class Image:
    """A part of a message that is a picture: the bytes of its file, and what kind of file that is."""

    data: bytes
    media_type: str  # such as "image/png"


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for; `call_id` names it for the message with its result, where there is one."""

    name: str
    arguments: dict[str, Any]
    call_id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    An assistant's message may have `reasoning` that came before its content, and `tool_calls` after it. A message of
    the role "tool" holds the result of one call, which `call_id` and `name` tell.
    """

    role: str
    content: str | tuple[Text | Image, ...] = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """The text of its content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures of its content."""
        return () if isinstance(self.content, str) else tuple(p for p in self.content if isinstance(p, Image))

    def to_template(self) -> dict[str, Any]:
        """What a chat template is given for it, by the names that the templates on the hub use.

        What the message does not have is left out, since templates look whether it is there. Pictures leave no trace.
        """
        calls = [
            {
                "type": "function",
                **({"id": call.call_id} if call.call_id else {}),
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self.tool_calls
        ]
        more = {
            "reasoning_content": self.reasoning,
            "tool_calls": calls,
            "tool_call_id": self.call_id,
            "name": self.name,
        }
        return {"role": self.role, "content": self.text, **{key: value for key, value in more.items() if value}}
