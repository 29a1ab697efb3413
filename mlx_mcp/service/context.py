"""What a model is told before it answers, out of a system prompt, files and messages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_mcp.chat.message import Message, Text
from mlx_mcp.service.caller import Caller

BREAK = "\n\n"  # between files and prompt


@dataclass(frozen=True)
class Context:
    """What a model is told, in this order."""

    system: str = ""
    files: tuple[str, ...] = ()  # paths
    messages: tuple[Message, ...] = ()


async def chat(caller: Caller, context: Context) -> tuple[Message, ...]:
    """The messages of a context, with its files read.

    Raises:
        InvalidRequest: a file is not there, or not for this caller.
    """
    return laid_out(context.system, await read(caller, context.files), context.messages)


async def read(caller: Caller, files: Sequence[str]) -> str:
    """The text of files; nothing of none.

    Raises:
        InvalidRequest: one is not there, or not for this caller.
    """
    return await asyncio.to_thread(caller.files.read, list(files)) if files else ""


def laid_out(system: str, files: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, with the files before the user's first, so that calls with the same files begin the same.

    A turn may begin with tools' results, which nothing may come before.
    """
    if files:
        at = next((i for i, message in enumerate(messages) if message.role != "tool"), len(messages))
        opened = at < len(messages) and messages[at].role == "user"
        first = messages[at] if opened else Message("user")
        messages = (*messages[:at], with_text(first, before=files + BREAK), *messages[at + opened :])
    return (Message("system", system), *messages) if system else messages


def with_text(message: Message, before: str = "", after: str = "") -> Message:
    """The message with more text around its content."""
    if isinstance(message.content, str):
        return replace(message, content=before + message.content + after)
    return replace(message, content=(Text(before), *message.content, Text(after)))
