"""What a model is given: the chat as token ids, and what its answer must look like."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Reasoning(StrEnum):
    """How long a model is asked to think before it answers. None in its place leaves that to the model's template."""

    OFF = "off"
    ON = "on"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


# Notes of what a template has made of it.
NO_SWITCH = "The model's chat template has no switch for reasoning, so `reasoning` changed nothing."
NO_OFF = "The model's chat template cannot switch reasoning off, so the lowest effort was asked for."
NO_EFFORTS = "The model's chat template knows no efforts of reasoning, so it was only switched on."
NO_BUDGET = "The markers of this model's thoughts, if it has any, are not known, so `reasoning_budget` ended nothing."


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
    CALLS = "calls"  # Lark of our own, which names tokens: no caller gives it


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like."""

    kind: GrammarKind
    source: str  # a JSON schema as JSON text, a regular expression, or a Lark grammar


AUTO, NONE, REQUIRED = "auto", "none", "required"  # every other choice of a tool is a function's name


@dataclass(frozen=True)
class Holding:
    """What an answer is held to.

    Where it `thinks`, thoughts may come before what it is held to otherwise; after `thinking_tokens` they are ended.
    """

    grammar: Grammar | None = None
    thinks: bool = True
    thinking_tokens: int | None = None
    tools: tuple[dict[str, Any], ...] = ()  # function definitions in OpenAI's form
    tool_choice: str = AUTO

    @property
    def anything(self) -> bool:
        """Whether it says anything."""
        return self.grammar is not None or self.thinking_tokens is not None or bool(self.tools)
