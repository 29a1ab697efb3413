"""What the tools share of what they can be called with: checked here, and described for the calling model."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from mlx_mcp.api.mcp.as_sent import AsSent, from_json
from mlx_mcp.api.web.given import GivenMessage
from mlx_mcp.service.files import MAX_FILES


def switch(given: Any) -> Any:
    """`reasoning` as callers of earlier versions send it, who knew true and false alone."""
    return {"true": "on", "false": "off"}.get(str(given).lower(), given)


def function_as_sent(given: Any) -> Any:
    """A tool whose parts may be JSON texts."""
    given = from_json(given, (dict,))
    if isinstance(given, dict) and "function" in given:
        function = from_json(given["function"], (dict,))
        if isinstance(function, dict) and "parameters" in function:
            function = function | {"parameters": from_json(function["parameters"], (dict,))}
        return given | {"function": function}
    return given


# A text that may be left out is `str`, not `str | None`: of those the SDK parses what reads as JSON, such as the
# regular expression "[0]", and then finds that it is no text.
Functions = Annotated[
    list[Annotated[dict[str, Any], BeforeValidator(function_as_sent)]] | None,
    Field(max_length=128, description="Functions in OpenAI's form, which the model may call."),
]


def option(shown: str) -> dict[str, str]:
    """That an argument is rare, and how it is shown among the others that are."""
    return {"option": shown}


class Arguments(AsSent, ArgModelBase):
    """A tool's arguments, none by default. A tool gets them whole, so that tools can share some by inheritance.

    Rare arguments are shown as members of one object, `options`. They are taken beside it as well, and others in it.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_options(cls, given: Any) -> Any:
        """The arguments with the members of `options` among them.

        Raises:
            ValueError: something is given twice.
        """
        if not isinstance(given, dict) or "options" not in given:
            return given
        options = from_json(given["options"], (dict,))
        rest = {name: value for name, value in given.items() if name != "options"}
        if options is None:
            return rest
        if not isinstance(options, dict):
            raise ValueError(f"`options` is an object, not {options!r:.80}")
        twice = [name for name in options if rest.get(name, options[name]) != options[name]]
        if twice:
            raise ValueError(f"`{twice[0]}` is given twice, in `options` and beside it")
        return options | rest

    def model_dump_one_level(self) -> dict[str, Any]:
        """What the SDK calls the tool with."""
        return {"given": self}


class EarlierMessage(AsSent, GivenMessage):
    """A message of the context."""


def chosen(given: Any) -> Any:
    """A choice of tools as a word; in OpenAI's form a function is chosen by an object."""
    match given:
        case {"type": "function", "function": {"name": name}}:
            return name
    return given


class LongArguments(Arguments):
    """Of a tool whose call may go on after its answer."""

    wait_s: Annotated[
        float | None,
        Field(ge=0, le=86_400, description="Answer by then, with a result_id if it still runs; 0: at once."),
    ] = None


class ContextArguments(LongArguments):
    """What comes before the prompt."""

    system: Annotated[str, Field(description="System prompt; a session has its own already.")] = ""
    files: Annotated[
        list[str] | None,
        Field(max_length=MAX_FILES, description="Paths of text files, read by the server and put before the prompt."),
    ] = None
    model: Annotated[str, Field(description="A name from list_models, if not the default.")] = ""
