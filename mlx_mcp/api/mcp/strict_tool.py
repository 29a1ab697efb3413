"""A tool whose arguments are checked to the letter, and whose schema says no more than a caller needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

from mcp.server.mcpserver.tools import Tool
from mcp_types import ToolAnnotations
from pydantic import Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from mlx_mcp.api.mcp.answer_arguments import SHARED
from mlx_mcp.api.mcp.results import Part, Running
from mlx_mcp.errors import nearest

CLAUDE_CODE_CHARS = 400_000  # a result up to this length comes inline; Claude Code itself allows 500,000 at most


class LeanSchema(GenerateJsonSchema):
    """Says what a caller needs and no more, since hosts put it into every prompt: no titles, and nothing of null.

    Null stands for an argument that is left out, and is taken all the same.
    """

    def field_title_should_be_set(self, schema: Any) -> bool:
        """None: they repeat the names."""
        return False

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        """Without the class's name and docstring."""
        made = super().model_schema(schema)
        return {key: value for key, value in made.items() if key not in ("title", "description")}

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        """Without saying that an object may have any members, which every object may."""
        made = super().dict_schema(schema)
        return {key: value for key, value in made.items() if (key, value) != ("additionalProperties", True)}

    def nullable_schema(self, schema: Any) -> JsonSchemaValue:
        """The schema of what is not null."""
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        """Without a default that says nothing."""
        made = super().default_schema(schema)
        return {key: value for key, value in made.items() if key != "default" or value not in (None, "")}


class StrictTool(Tool):
    """A tool whose arguments are checked to the letter, and whose refusals say what to change.

    The SDK ignores arguments it does not know, so that a typo silently falls back to a default, and reports a bad value
    with a link to pydantic's documentation.
    """

    option_names: list[str] = Field(default_factory=list)  # what can be in `options`

    @classmethod
    def make(
        cls, function: Callable[..., Any], title: str, daily: bool = False, long: bool = False, **hints: bool
    ) -> StrictTool:
        """A tool of an async method, which is `given` its Arguments; its docstring is the description.

        A `daily` one is in every prompt of hosts that otherwise search for tools. The result of a `long` one may be
        that it goes on, or a part.
        """
        assert isinstance(function, MethodType)
        described = cls._describe(function.__func__, title, daily, long, **hints)
        return described.model_copy(update={"fn": function})

    @classmethod
    @cache  # pydantic takes 10 ms for the schemas of one tool, and each connection has a server of its own
    def _describe(cls, function: Callable[..., Any], title: str, daily: bool, long: bool, **hints: bool) -> StrictTool:
        """The tool of a method, whatever object it is of."""
        meta: dict[str, Any] = {"anthropic/alwaysLoad": True} if daily else {}
        if long:
            meta["anthropic/maxResultSizeChars"] = CLAUDE_CODE_CHARS
        tool = cls.from_function(
            MethodType(function, object()),
            title=title,
            description=inspect.cleandoc(function.__doc__ or ""),
            annotations=ToolAnnotations(title=title, open_world_hint=False, **hints),
            meta=meta or None,
        )
        assert isinstance(tool, StrictTool)
        model: Any = tool.fn_metadata.arg_model.model_fields["given"].annotation
        tool.fn_metadata.arg_model = model
        schema = model.model_json_schema(by_alias=True, schema_generator=LeanSchema)
        properties, options = apart(schema.get("properties", {}))
        tool.parameters, tool.option_names = schema | {"properties": properties}, options
        if long:
            tool.fn_metadata.output_schema = or_other(tool.fn_metadata.output_schema)
            tool.fn_metadata.output_model = None  # the SDK would check what goes on as if it had ended
        return tool

    def advice(self, error: ValidationError) -> str:
        """What is wrong with which argument of a call, in one line; long values are cut."""
        faults, there_are = [], dict[str, str]()
        for fault in error.errors(include_url=False):
            if not fault["loc"]:  # of the arguments as a whole
                faults.append(fault["msg"].removeprefix("Value error, "))
                continue
            *place, name = map(str, fault["loc"])
            given = "" if fault["type"] == "missing" else f" (given: {fault['input']!r:.80})"
            meant = ""
            if fault["type"] == "extra_forbidden":
                known = self._names(fault["loc"][:-1])
                near = nearest(name, [*known, *self.option_names])
                meant = f"; did you mean `{near}`?" if near else ""
                there_are[".".join([self.name, *place])] = ", ".join(known) or "nothing"
            faults.append(f"{'.'.join([*place, name])}: {fault['msg']}{given}{meant}")
        told = "; ".join(faults)
        takes = "".join(f" {place} takes {names}." for place, names in there_are.items())
        told += "" if told.endswith("?") else "."
        return f"{self.name} was not called right: {told}{takes} Correct the arguments and call again."

    def _names(self, place: tuple[int | str, ...]) -> list[str]:
        """What there can be at a place in the arguments."""
        schema = self.parameters
        for step in place:
            schema = schema["items"] if isinstance(step, int) else schema["properties"][step]
            if "$ref" in schema:
                schema = self.parameters["$defs"][schema["$ref"].rpartition("/")[2]]
        return list(schema.get("properties", ()))


def apart(properties: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A tool's arguments with the rare ones in one object, and the names of these.

    What is the tool's own comes before what it shares with others.
    """
    options = {name: each["option"] for name, each in properties.items() if "option" in each}
    names = sorted(properties.keys() - options.keys(), key=list(properties).index)
    names.sort(key=lambda name: SHARED.index(name) if name in SHARED else -1)
    shown = {name: properties[name] for name in names}
    if options:
        shown["options"] = {"type": "object", "description": f"Rarely needed: {', '.join(options.values())}."}
    return shown, list(options)


def or_other(schema: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a result that may also be that the call goes on, or a part: nothing of it is required."""
    schema = schema or {"type": "object", "properties": {}}
    properties: dict[str, Any] = {}
    for other in (Running, Part):
        properties |= other.model_json_schema(mode="serialization")["properties"]
    properties["status"] = {"enum": ["running", "part"], "type": "string"}
    kept = {key: value for key, value in schema.items() if key != "required"}
    return kept | {"properties": {**properties, **schema["properties"]}}
