"""The tools that were offered to a model: values by their schemas, and what of a call does not fit them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlx_mcp.chat.formats.cursor import Malformed, read_json
from mlx_mcp.chat.message import ToolCall

# JSON's types by the Python types of its values; a bool is an int in Python.
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int, float),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_WORDS = {"True": True, "False": False, "None": None}  # as templates write Python's values


class Offered:
    """The tools of one call, by name."""

    def __init__(self, tools: Sequence[dict[str, Any]]) -> None:
        """`tools` are function definitions in OpenAI's form."""
        functions = [tool.get("function", tool) for tool in tools]
        self._schemas: dict[str, dict[str, Any]] = {}
        for function in functions:
            schema = function.get("parameters")
            self._schemas[function["name"]] = schema if isinstance(schema, dict) else {}

    def __contains__(self, name: str) -> bool:
        return name in self._schemas

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tools."""
        return tuple(self._schemas)

    def named(self, call: ToolCall) -> ToolCall:
        """The call by its tool's own name, without the namespace that models are trained to write before it."""
        name = call.name.removeprefix("functions.")
        return replace(call, name=name) if call.name not in self and name in self else call

    def parameters(self, tool: str) -> tuple[str, ...]:
        """The names of a tool's parameters."""
        properties = self._schemas.get(tool, {}).get("properties")
        return tuple(properties) if isinstance(properties, dict) else ()

    def schema(self, tool: str, key: str) -> dict[str, Any]:
        """The schema of a tool's parameter; one that says nothing where there is none."""
        properties = self._schemas.get(tool, {}).get("properties")
        found = properties.get(key) if isinstance(properties, dict) else None
        return found if isinstance(found, dict) else {}

    def value(self, tool: str, key: str, written: str, is_string: bool | None = None) -> Any:
        """The value of an argument that is written without quotes; see `typed`."""
        return typed(written, self.schema(tool, key), is_string)

    def misfits(self, call: ToolCall) -> list[str]:
        """What of the call's arguments its tool's schema does not have; empty if it obeys."""
        schema = self._schemas[call.name]
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        required = schema.get("required")
        missing = [key for key in (required if isinstance(required, list) else []) if key not in call.arguments]
        found = [f"{key} is missing" for key in missing]
        for key, value in call.arguments.items():
            if key not in properties:
                if schema.get("additionalProperties") is False or properties:
                    found.append(f"{key} is not one of its parameters")
                continue
            types = types_of(properties[key])
            if types and not any(_is(value, name) for name in types):
                found.append(f"{key} is no {' or '.join(sorted(types))}")
            choices = properties[key].get("enum") if isinstance(properties[key], dict) else None
            if isinstance(choices, list) and value not in choices:
                found.append(f"{key} is none of {json.dumps(choices, ensure_ascii=False)}")
        return found


def typed(written: str, schema: dict[str, Any], is_string: bool | None = None) -> Any:
    """The value of what is written without quotes.

    Where the schema has a string and nothing else, that is exactly what is written. Other types are read as JSON, and
    what cannot be read so stays as it is written. `is_string` is what the notation itself says.
    """
    types = types_of(schema)
    if is_string or (is_string is None and types == {"string"}):
        return written
    text = written.strip()
    try:
        value = read_json(text)
    except Malformed:
        value = _WORDS.get(text, written)
    if is_string is False:
        return value
    fits = not isinstance(value, str) and any(_is(value, name) for name in types or _TYPES)
    return value if fits else written


def types_of(schema: Any) -> set[str]:
    """The types that a schema allows; empty where it does not say."""
    if not isinstance(schema, dict):
        return set()
    said = schema.get("type")
    if isinstance(said, str):
        return {said} & set(_TYPES)
    if isinstance(said, list):
        return {name for name in said if name in _TYPES}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            parts = [types_of(part) for part in schema[key]]
            return set().union(*parts) if all(parts) else set()
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return {name for value in values for name in _TYPES if _is(value, name) and name != "number"}
    return set()


def _is(value: Any, name: str) -> bool:
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
