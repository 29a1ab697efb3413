"""What a model is given: the chat as token ids, and what its answer must look like."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reasoning(StrEnum):
    """How long a model is asked to think before it answers. None in its place leaves that to the model's template."""

    OFF = "off"
    ON = "on"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True)
class Prompt:
    """A chat as token ids, in which state the answer to it begins, and what the caller should know of it."""

    ids: tuple[int, ...]
    reasoning: bool = False  # the template opened the reasoning: the answer begins inside it
    notes: tuple[str, ...] = ()  # whole sentences, such as that the model has no chat template


class GrammarKind(StrEnum):
    """What a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like."""

    kind: GrammarKind
    source: str  # a JSON schema as JSON text, a regular expression, or a Lark grammar
