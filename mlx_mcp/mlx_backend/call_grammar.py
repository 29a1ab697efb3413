"""Grammars of calls over the tools' schemas, in llguidance's dialect of Lark, by a model's notation of calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from mlx_mcp.mlx_backend.call_notation import ID, Elements, Notation
from mlx_mcp.mlx_backend.constraint import checked, exact
from mlx_mcp.mlx_backend.control_tokens import ControlTokens

# A call's id, where it has to have one (Mistral's), and its number among several, are the model's to choose.
FREE = re.compile(rf"({ID})|(?<![0-9A-Za-z])0(?![0-9A-Za-z])")
GAP = '("\\n" "\\n"?)? '  # two lines that may come first, behind thoughts
ID_RULE, NUMBER_RULE = "/[a-zA-Z0-9]{9}/", "/[0-9]{1,3}/"
LIMITS_OF_TEXT = ("pattern", "format", "minLength", "maxLength")


class CallGrammar:
    """Writes the grammars of one model's calls; `special` are the control tokens that no text can spell."""

    def __init__(self, notation: Notation, controls: ControlTokens, special: frozenset[int]) -> None:
        self._notation, self._controls, self._special = notation, controls, special

    def behind_opener(self, tools: Sequence[dict[str, Any]]) -> str:
        """A grammar of one call of a tool, or of a list of them, behind the notation's opener.

        Raises:
            ValueError: a schema has something that would not be obeyed.
        """
        return f"start: calls\n{self._rules(tools)}"

    def whole(self, tools: Sequence[dict[str, Any]], gap: bool) -> str:
        """The same with all that comes before; a `gap` of two lines may come first.

        Raises:
            ValueError: see behind_opener.
        """
        return f"start: {GAP if gap else ''}{self.literal(self._notation.begin)} calls\n{self._rules(tools)}"

    def literal(self, text: str) -> str:
        """A text in the grammar, in which control tokens are named by their ids."""
        parts, start = [], 0
        for found in self._controls.pattern.finditer(text):
            parts += [quoted(text[start : found.start()]), f"<[{self._controls.ids[found[0]]}]>"]
            start = found.end()
        return " ".join(filter(None, [*parts, quoted(text[start:])]))

    def _rules(self, tools: Sequence[dict[str, Any]]) -> str:
        notation, rules = self._notation, list[str]()
        more = '("," " "? one)*' if notation.head or notation.tail else ""
        rules.append(joined("calls:", self.literal(notation.head), "one", more, self.literal(notation.tail)))
        rules.append(f"one: {' | '.join(f'one_{i}' for i in range(len(tools)))}")
        ways = [self.literal(text) or '""' for text in notation.between]
        for i, tool in enumerate(tools):
            function, given = tool["function"], parameters(tool)
            if notation.elements is None:
                arguments = f"%json {json.dumps(given, ensure_ascii=False, allow_nan=False)}"
            else:
                names, more_rules = self._elements(notation.elements, given, i)
                arguments, rules = " ".join(names), rules + more_rules
            name = self.literal(notation.before + function["name"])
            rules.append(joined(f"one_{i}:", name, f"({' | '.join(ways)})", arguments, self.literal(notation.after)))
        return "\n".join(rules)

    def _elements(self, elements: Elements, schema: dict[str, Any], i: int) -> tuple[list[str], list[str]]:
        """What follows the name of tool i, and the rules of that: an element for each argument."""
        names, rules = list[str](), list[str]()
        shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        for j, (key, given) in enumerate((schema.get("properties") or {}).items()):
            names.append(f"arg_{i}_{j}" + ("" if key in schema.get("required", ()) else "?"))
            is_text, value = self._value(elements, given, shared, f"text_{i}_{j}", rules)
            opened = self.literal(elements.key + key + (elements.string if is_text else elements.other))
            rules.append(joined(f"arg_{i}_{j}:", opened, value))
        return names, rules

    def _value(
        self, elements: Elements, given: Any, shared: dict[str, Any], name: str, rules: list[str]
    ) -> tuple[bool, str]:
        """Whether a value is text, and what it is with all that closes it."""
        close = self.literal(elements.close)
        schema = given if isinstance(given, dict) else {}
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if choices and all(isinstance(choice, str) for choice in choices):
            return True, f"({' | '.join(json.dumps(choice, ensure_ascii=False) for choice in choices)}) {close}"
        types = schema.get("type", "string" if not choices and "anyOf" not in schema and "$ref" not in schema else "")
        if "string" in ([types] if isinstance(types, str) else types):
            if limits := [key for key in LIMITS_OF_TEXT if key in schema]:
                raise ValueError(f"not supported where arguments are not JSON: {', '.join(limits)}")
            return True, self._text(elements.close, name, rules)
        if elements.other != elements.string and "number" in elements.other and types not in ("integer", "number"):
            raise ValueError("not supported in this model's notation: arguments that are neither texts nor numbers")
        if not types and (
            not choices or any(isinstance(choice, str) for choice in choices)
        ):  # it may be a text in this notation, or not
            raise ValueError("not supported where arguments are not JSON: a parameter without a type")
        return False, f"%json {json.dumps(checked(schema | shared), ensure_ascii=False, allow_nan=False)} {close}"

    def _text(self, close: str, name: str, rules: list[str]) -> str:
        """Any text, to the first `close`."""
        control = self._controls.pattern.search(close)
        if control is None or self._controls.ids[control[0]] not in self._special:
            end = close if control is None else close[: control.end()]
            named = "" if control is None else f"  // <[{self._controls.ids[control[0]]}]>"
            rules.append(f"{name}[suffix={json.dumps(end, ensure_ascii=False)}]: /(?s:.*)/{named}")
            return joined(name, self.literal(close[len(end) :]))
        before = re.escape(close[: control.start()]).replace("\\\n", "\\n").replace("/", "\\/")
        return joined(f"/(?s:.*){before}/", self.literal(close[control.start() :]))


def parameters(tool: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, as llguidance takes it: an object that has what is offered and no more.

    Raises:
        ValueError: it has something that would not be obeyed.
    """
    given = tool["function"].get("parameters") or {}
    closed = {"additionalProperties": False} if given.get("properties") else {}
    return checked(json.loads(json.dumps({"type": "object"} | closed | given), parse_int=exact))


def joined(*parts: str) -> str:
    """The parts that are not empty."""
    return " ".join(filter(None, parts))


def quoted(text: str) -> str:
    """A text as Lark's literals and rules."""
    parts, start = [], 0
    for found in FREE.finditer(text):
        parts += [json.dumps(text[start : found.start()], ensure_ascii=False), ID_RULE if found[1] else NUMBER_RULE]
        start = found.end()
    parts.append(json.dumps(text[start:], ensure_ascii=False))
    return " ".join(part for part in parts if part != '""')
