"""How a model writes calls, taken from a call that its own chat template shows; as grammars over the tools' schemas.

Where names and arguments stand in what the template shows, every other text is the notation's. That serves notations
whose arguments are one JSON object. The reader of the model's format has to read the shown call as what it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mlx_mcp.chat.formats.format import CallSyntax, Format
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.mlx_backend.control_tokens import ControlTokens

SAMPLE = ToolCall("f69b9ca4cb423", {"x": "69b9ca4cb42346d7"}, "000000001")
MESSAGES = [Message("user", "x"), Message("assistant", tool_calls=(SAMPLE,))]
OFFERED = (
    {
        "type": "function",
        "function": {
            "name": SAMPLE.name,
            "description": "x",
            "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
        },
    },
)
ID = "/[a-zA-Z0-9]{9}/"  # of calls, where they have to have one (Mistral's)


@dataclass(frozen=True)
class Notation:
    """The texts around a call's name and arguments.

    `begin` is all that comes before the first call's `opener`, and the opener; calls end with `after`. Between the
    name and the arguments stands one of `between`.
    """

    begin: str
    opener: str
    before: str
    between: tuple[str, ...]
    after: str

    def body(self, tools: Sequence[tuple[str, str]], literal: Callable[[str], str]) -> str:
        """The rules of a Lark grammar in which `call` is a call behind its opener; `literal` writes texts in it.

        `tools` are names, and schemas of arguments.
        """
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        between = " | ".join(filter(None, map(literal, self.between))) or '""'
        for i, (name, schema) in enumerate(tools):
            parts = [literal(self.before + name), f"({between})", f"%json {schema}", literal(self.after)]
            rules.append(f"call_{i}: {' '.join(filter(None, parts))}")
        return "\n".join(rules)


HARMONY = Notation(
    "<|channel|>commentary to=functions.",
    "to=functions.",
    "",
    (" <|constrain|>json<|message|>", "<|channel|>commentary <|constrain|>json<|message|>"),
    "",
)


def notation_of(form: Format, shown: str, stops: Sequence[str]) -> Notation | None:
    """The notation of a format's calls, by what the template makes of MESSAGES; None if it does not show that.

    `stops` are the texts of the tokens that end a turn.
    """
    if form.name == "harmony":
        return HARMONY
    syntax, name = form.calls, shown.rfind(SAMPLE.name)
    if syntax is None or name < 0:
        return None
    # The tools that were offered may be shown with the same name before, and the name again behind the arguments.
    value = shown.find(SAMPLE.arguments["x"])
    name = shown.rfind(SAMPLE.name, 0, value)
    given = shown.rfind("{", name, value)
    if min(name, given) < 0:
        return None
    with suppress(ValueError):
        arguments, end = json.JSONDecoder().raw_decode(shown, given)
        if arguments == SAMPLE.arguments:
            return _around(syntax, shown, (name, given, end), stops)
    return None


def _around(syntax: CallSyntax, shown: str, places: tuple[int, int, int], stops: Sequence[str]) -> Notation | None:
    """The texts around a name, and arguments from a place to another."""
    name, given, end = places
    opener = max(syntax.openers, key=lambda text: shown.rfind(text, 0, name), default="")
    start = shown.rfind(opener, 0, name) if opener else -1
    if start < 0:
        opener, start = "", shown.rfind("{", 0, name)
    section = shown.rfind(syntax.begin, 0, start) if syntax.begin != opener else -1
    first = section if section >= 0 and not shown[section + len(syntax.begin) : start].strip() else start
    rest = shown[end:]
    if syntax.after and syntax.after in rest:
        after = rest[: rest.index(syntax.after) + len(syntax.after)]
    else:
        cuts = [rest.find(text) for text in (*stops, syntax.end) if text and text in rest]
        after = rest[: min(cuts, default=len(rest))].rstrip()
    try:
        read = syntax.parse(shown[start:end] + after, OFFERED)
    except Exception:  # it is not written as this format's models write
        return None
    if start < 0 or [(call.name, call.arguments) for call in read] != [(SAMPLE.name, SAMPLE.arguments)]:
        return None
    before, between = shown[start + len(opener) : name], shown[name + len(SAMPLE.name) : given]
    return Notation(shown[first:start] + opener, opener, before, (between,), after)


def literals(text: str, controls: ControlTokens) -> str:
    """A text in a Lark grammar, in which control tokens are named by their ids."""
    parts, start = [], 0
    for found in controls.pattern.finditer(text):
        parts += [_quoted(text[start : found.start()]), f"<[{controls.ids[found[0]]}]>"]
        start = found.end()
    return " ".join(filter(None, [*parts, _quoted(text[start:])]))


def _quoted(text: str) -> str:
    """A text as Lark's literals, in which a call's id may be any."""
    return f" {ID} ".join(json.dumps(part, ensure_ascii=False) if part else "" for part in text.split(SAMPLE.call_id))
