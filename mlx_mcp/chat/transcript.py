"""What was said in a session, out of its text: who speaks is read from the control tokens around a message.

Covers the ways in which chat templates open a message: a token with the role's name, as in `<|user|>` and `[INST]`,
and a token that opens a header which begins with the role, as in ChatML, Llama 3, Gemma and Harmony. What matches
neither is one text without a role. Knows no model: calls and thoughts stay in the text as the model's template writes
them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "inst": "user",
    "assistant": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "observation": "tool",
    "environment": "tool",
}
OPENS_HEADER = re.compile(r"start|turn", re.IGNORECASE)
HEADER = re.compile(rf"({'|'.join(ROLES)})\b[^\n]*(?:\n|$)", re.IGNORECASE)
# Tokens that stand between messages, and say nothing of their own.
FRAME = re.compile(r"end|eo[tms]|bo[st]|begin|start|header|message|turn|im_|pad|^</?s>$|^\[/", re.IGNORECASE)


@dataclass(frozen=True)
class Said:
    """A message of a session, or what of it was said in one turn. `role` is empty if it is not known who speaks."""

    role: str
    text: str
    turn: int | None = None  # how many tokens come before the turn in which it was said; None if that is not known


def said_in(parts: Sequence[str | Sequence[Any]]) -> list[Said]:
    """The messages of a session, whose text is in parts; see ChatTokenizer.transcript.

    Messages without text are left out. One that goes on in the next turn is told as two.
    """
    said: list[Said] = []
    turn: int | None = None
    role, content = "", list[tuple[str, bool]]()  # pieces, and which of them are control tokens
    opened = False  # whether a header may come

    def close() -> None:
        while content and ((content[-1][1] and FRAME.search(content[-1][0])) or not content[-1][0].strip()):
            content.pop()
        while content and ((content[0][1] and FRAME.search(content[0][0])) or not content[0][0].strip()):
            content.pop(0)
        if content:
            said.append(Said(role, "".join(text for text, _ in content).strip(), turn))
        content.clear()

    for part in parts:
        if not isinstance(part, str) and len(part) > 1:
            close()
            turn = int(part[1])
        elif not isinstance(part, str):
            named = role_of(part[0])
            if named:
                close()
                role = named
            else:
                content.append((part[0], True))
            opened = not named and bool(OPENS_HEADER.search(part[0]))
        elif opened and (header := HEADER.match(part)) is not None:
            close()
            role, opened = ROLES[header[1].lower()], False
            content.append((part[header.end() :], False))
        elif part:
            content.append((part, False))
            opened = False
    close()
    return said


def role_of(token: str) -> str:
    """The role that a control token names, as `<|user|>` does; empty if it names none. `[/INST]` opens an answer."""
    word = re.sub(r"[^a-z/]", "", token.lower())
    return "assistant" if word == "/inst" else ROLES.get(word.removesuffix("prompt").removesuffix("results"), "")
