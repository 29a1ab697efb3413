"""What callers of several faces give in one form: earlier messages, calls of tools, grammars."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.errors import InvalidRequest


class GivenMessage(BaseModel):
    """A message of the context."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant", "tool"]
    content: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    name: str = ""
    call_id: str = ""

    def to_message(self) -> Message:
        """The message as the engine has it.

        Raises:
            InvalidRequest: a call is none.
        """
        calls = tuple(map(called, self.tool_calls or ()))
        return Message(self.role, self.content, tool_calls=calls, call_id=self.call_id, name=self.name)


def called(given: dict[str, Any]) -> ToolCall:
    """A call as results have it, or in OpenAI's form.

    Raises:
        InvalidRequest: it is none.
    """
    function = given.get("function", given)
    match function:
        case {"name": str(name), "arguments": dict() | str() as arguments} if name:
            with suppress(ValueError):
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if isinstance(arguments, dict):
                return ToolCall(name, arguments, str(given.get("id") or ""))
    raise InvalidRequest(
        f"This is no call: {json.dumps(given, ensure_ascii=False)[:80]}; write it as it came in `tool_calls`: "
        '{"name": …, "arguments": {…}}, with its "id" if it had one.'
    )


def one_grammar(json_schema: dict[str, Any] | None, regex: str, lark: str) -> Grammar | None:
    """The one grammar that an answer obeys.

    Raises:
        InvalidRequest: there are several.
    """
    grammars = {
        GrammarKind.JSON_SCHEMA: "" if json_schema is None else json.dumps(json_schema),
        GrammarKind.REGEX: regex,
        GrammarKind.LARK: lark,
    }
    wanted = [Grammar(kind, source) for kind, source in grammars.items() if source]
    if len(wanted) > 1:
        raise InvalidRequest("Give one of json_schema, regex and grammar, not several.")
    return wanted[0] if wanted else None
