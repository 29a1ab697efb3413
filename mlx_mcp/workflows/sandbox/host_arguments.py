"""What the host functions are called with, checked, and what an answer is in the program."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.errors import GenerationFailed, MlxMcpError
from mlx_mcp.service.values import Result, Sampling


class WrongCall(Exception):
    """A function was not called right; the text says what is wrong."""


@dataclass(frozen=True)
class How:
    """How prompts are to be answered."""

    system: str = ""
    grammar: Grammar | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def value(self, outcome: Result | MlxMcpError) -> tuple[Any, bool]:
        """What an answer is in the program: a text, or with a schema what it says; and whether it was cut off.

        Raises:
            MlxMcpError: there is no answer, or only a part of what the schema asks for.
        """
        if isinstance(outcome, MlxMcpError):
            raise outcome
        if self.grammar is None:
            return outcome.text, outcome.finish_reason.value == "length"
        try:
            return json.loads(outcome.text), False
        except ValueError as error:
            raise GenerationFailed(
                f"The answer was cut off after {outcome.completion_tokens} tokens, so it is no JSON. Give a larger "
                "max_tokens, or bounds in the schema (maxLength, maxItems)."
            ) from error


def how_of(schema: Any, system: Any, max_tokens: Any, temperature: Any) -> How:
    """How prompts are to be answered, as the program says it.

    Raises:
        WrongCall: something is of another type.
    """
    grammar = None
    if schema is not None:
        grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(expect("schema", schema, dict)))
    if max_tokens is not None:
        expect("max_tokens", max_tokens, int)
    if temperature is not None:
        expect("temperature", temperature, int, float)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    return How(expect("system", system, str), grammar, sampling)


def expect(name: str, given: Any, *types: type) -> Any:
    """An argument that is of one of these types.

    Raises:
        WrongCall: it is of another.
    """
    if isinstance(given, types) and not (isinstance(given, bool) and bool not in types):
        return given
    wanted = " or ".join(WORDS[each] for each in types if each is not tuple)
    raise WrongCall(f"{name} is {wanted}, not {type(given).__name__}")


WORDS = {str: "a str", list: "a list", dict: "a dict (a JSON schema)", int: "an int", float: "a float"}


def texts(name: str, given: Any) -> list[str]:
    """An argument that is a list of texts.

    Raises:
        WrongCall: it is none.
    """
    listed = expect(name, given, list, tuple)
    return [expect(f"{name}[{index}]", each, str) for index, each in enumerate(listed)]


def as_text(item: Any) -> str:
    """An item as a model reads it: a text as it is, anything else as JSON."""
    return item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
