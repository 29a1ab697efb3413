"""How a tool is called: strict arguments, errors → protocol, progress, disconnects, and on whose behalf."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import anyio
from mcp import MCPError
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp.server.mcpserver.tools import Tool
from mcp_types import INTERNAL_ERROR, ToolAnnotations
from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from mlx_mcp.api.mcp.arguments import SHARED
from mlx_mcp.errors import EngineDead, MlxMcpError, nearest
from mlx_mcp.service.activity import Activity, Meter
from mlx_mcp.service.generate import Report

PROGRESS_INTERVAL_S = 0.1  # each notification costs about 0.5 ms of the event loop
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound="HasActivity")


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

    @classmethod
    def make(cls, function: Callable[..., Any], title: str, **annotations: bool) -> StrictTool:
        """A tool of an async function, which is `given` its Arguments; its docstring is the description."""
        tool = cls.from_function(
            function,
            title=title,
            description=inspect.cleandoc(function.__doc__ or ""),
            annotations=ToolAnnotations(title=title, open_world_hint=False, **annotations),
            meta={"anthropic/alwaysLoad": True},
        )
        assert isinstance(tool, StrictTool)
        model: Any = tool.fn_metadata.arg_model.model_fields["given"].annotation
        tool.fn_metadata.arg_model = model
        schema = model.model_json_schema(by_alias=True, schema_generator=LeanSchema)
        # What is the tool's own comes before what it shares with others.
        names = sorted(schema.get("properties", ()), key=lambda name: SHARED.index(name) if name in SHARED else -1)
        tool.parameters = schema | {"properties": {name: schema["properties"][name] for name in names}}
        return tool

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        """Run the tool; see `Tool.run`."""
        try:
            return await super().run(arguments, context, convert_result)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError) and not isinstance(error, UnexpectedToolError):
                raise ToolError(f"{self.name} was not called right: {self._advice(error.__cause__)}") from error
            raise

    def _advice(self, error: ValidationError) -> str:
        """What is wrong with which argument, in one line; long values are cut."""
        faults, there_are = [], dict[str, str]()
        for fault in error.errors(include_url=False):
            *place, name = map(str, fault["loc"])
            given = "" if fault["type"] == "missing" else f" (given: {fault['input']!r:.80})"
            meant = ""
            if fault["type"] == "extra_forbidden":
                known = self._names(fault["loc"][:-1])
                near = nearest(name, known)
                meant = f"; did you mean `{near}`?" if near else ""
                there_are[".".join([self.name, *place])] = ", ".join(known) or "nothing"
            faults.append(f"{'.'.join([*place, name])}: {fault['msg']}{given}{meant}")
        told = "; ".join(faults)
        takes = "".join(f" {place} takes {names}." for place, names in there_are.items())
        return f"{told}{'' if told.endswith('?') else '.'}{takes} Correct the arguments and call again."

    def _names(self, place: tuple[int | str, ...]) -> list[str]:
        """What there can be at a place in the arguments."""
        schema = self.parameters
        for step in place:
            schema = schema["items"] if isinstance(step, int) else schema["properties"][step]
            if "$ref" in schema:
                schema = self.parameters["$defs"][schema["$ref"].rpartition("/")[2]]
        return list(schema.get("properties", ()))


class HasActivity(Protocol):
    """What tools belong to."""

    activity: Activity


def translated(
    tool: Callable[Concatenate[T, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[T, P], Coroutine[Any, Any, R]]:
    """Note a call as under way, and turn this package's errors into the protocol's, here and nowhere else."""

    @wraps(tool)
    async def run(self: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with self.activity.under_way():
                return await tool(self, *args, **kwargs)
        except EngineDead as error:
            raise MCPError(INTERNAL_ERROR, str(error)) from error  # no other arguments could help
        except MlxMcpError as error:
            raise ToolError(str(error)) from error

    return run


def tenant() -> str:
    """On whose behalf the call is: sessions and cached keys and values are never shared between two.

    The verified principal over HTTP with a token; everyone else is one.
    """
    token = get_access_token()
    return "" if token is None else token.client_id


def progress_reporter(context: Context[Any, Any]) -> Report:
    """Sends the progress of one or more generations, at most ten times a second and always upwards, as hosts want."""
    last, value = 0.0, 0.0

    async def report(meters: Sequence[Meter]) -> None:
        nonlocal last, value
        now = time.monotonic()
        if now - last < PROGRESS_INTERVAL_S:
            return
        last = now
        first, totals = meters[0], [meter.total for meter in meters]
        message = first.text or first.line
        if len(meters) > 1:
            message = f"{sum(meter.ended for meter in meters)} of {len(meters)} done"
            if first.total is None and not first.ended:  # it loads the model
                message += f"; {first.line}"
        # A value that stands still is raised by a hair: hosts take it as a sign of life.
        value = max(float(sum(meter.done for meter in meters)), value + 1e-3)
        total = None if None in totals else sum(total or 0 for total in totals)
        await context.report_progress(value, total, message)

    return report


async def while_connected(context: Context[Any, Any], work: Coroutine[Any, Any, R]) -> R:
    """Await the work, and cancel it when its HTTP client goes away.

    Newer protocol versions do this in the SDK; for older ones the SDK goes on for a client that can never come back to
    the answer, since no events are stored.
    """
    request = context.request_context.request
    if request is None or not hasattr(request, "receive"):
        return await work
    # A scope and a task, not a task group: that would wrap the work's errors.
    with anyio.CancelScope() as scope:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            scope.cancel()

        watching = asyncio.create_task(watch())
        try:
            return await work
        finally:
            watching.cancel()
    raise ToolError("The client disconnected.")
