"""What comes of a prompt: pieces of text, each of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TextKind(StrEnum):
    """What a piece of generated text is."""

    ANSWER = "answer"
    REASONING = "reasoning"
    TOOL_CALL = "tool_call"


@dataclass(frozen=True)
class Piece:
    """Text that became certain."""

    kind: TextKind
    text: str
