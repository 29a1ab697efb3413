"""The server that the conformance suite asks: this package's own, with tools, resources and prompts of fixed names.

The suite calls what it asks for by name (`test_simple_text`, `test://static-text` and so on), which no product has.
This program adds them to every server that `build_server` makes, and then starts `mlx-mcp` with the arguments it was
given, so that everything else is what users run: the command line, HTTP and the engine.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from mcp import MCPError
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.prompts.base import Prompt, UserMessage
from mcp_types import (
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    AudioContent,
    CallToolResult,
    Completion,
    CreateMessageRequest,
    CreateMessageRequestParams,
    ElicitRequest,
    ElicitRequestFormParams,
    EmbeddedResource,
    EmptyResult,
    ImageContent,
    InputRequiredResult,
    ListRootsRequest,
    SamplingMessage,
    SetLevelRequestParams,
    SubscribeRequestParams,
    TextContent,
    TextResourceContents,
    UnsubscribeRequestParams,
)
from pydantic import BaseModel, Field, JsonValue

import mlx_mcp.api.mcp.server
from mlx_mcp.api.mcp.calls import tenant
from mlx_mcp.api.mcp.results import reply
from mlx_mcp.api.mcp.server import Server
from mlx_mcp.api.mcp.waiting import takes_tasks
from mlx_mcp.errors import EngineDead, InvalidRequest
from mlx_mcp.service.jobs import Jobs, Work

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
WAV = "UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAAB9AAACABAAZGF0YQIAAAA="
TASK_S = 120.0  # longer than any of these
STEP_S = 0.05  # between two notifications, as the suite asks
F = TypeVar("F", bound=Callable[..., Any])


def add_fixtures(server: MCPServer[Any]) -> None:
    """Give a server everything that the suite calls by name."""
    add_contents(server)
    add_notifications(server)
    add_questions(server)
    add_multi_round_trips(server)
    add_states(server)
    add_resources(server)
    add_prompts(server)
    add_tasks(server)
    add_handlers(server)


def fixture(decorator: Callable[..., Callable[[F], F]]) -> Callable[[F], F]:
    """The decorator with a description, which the suite wants every tool and prompt to have."""
    return decorator(description="A fixture of the conformance suite.")


def text(content: str) -> TextContent:
    """A block of text."""
    return TextContent(type="text", text=content)


def resource(uri: str, kind: str, content: str) -> EmbeddedResource:
    """A block with a resource in it."""
    return EmbeddedResource(type="resource", resource=TextResourceContents(uri=uri, mime_type=kind, text=content))


def add_contents(server: MCPServer[Any]) -> None:
    """Tools that return each kind of content."""

    @fixture(server.tool)
    def test_simple_text() -> str:
        return "This is a simple text response for testing."

    @fixture(server.tool)
    def test_image_content() -> list[ImageContent]:
        return [ImageContent(type="image", data=PNG, mime_type="image/png")]

    @fixture(server.tool)
    def test_audio_content() -> list[AudioContent]:
        return [AudioContent(type="audio", data=WAV, mime_type="audio/wav")]

    @fixture(server.tool)
    def test_embedded_resource() -> list[EmbeddedResource]:
        return [resource("test://embedded-resource", "text/plain", "This is an embedded resource content.")]

    @fixture(server.tool)
    def test_multiple_content_types() -> list[TextContent | ImageContent | EmbeddedResource]:
        return [
            text("Multiple content types test:"),
            ImageContent(type="image", data=PNG, mime_type="image/png"),
            resource("test://mixed-content-resource", "application/json", '{"test": "data", "value": 123}'),
        ]

    @fixture(server.tool)
    def test_error_handling() -> str:
        raise RuntimeError("This tool intentionally returns an error for testing")

    @fixture(server.tool)
    def test_x_mcp_header(region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})] = "") -> str:
        return f"region={region}"


def add_notifications(server: MCPServer[Any]) -> None:
    """Tools that notify the client while they run."""

    @fixture(server.tool)
    async def test_tool_with_logging(ctx: Context) -> str:
        for line in ("Tool execution started", "Tool processing data", "Tool execution completed"):
            await ctx.info(line)
            await asyncio.sleep(STEP_S)
        return "Tool with logging executed successfully"

    @fixture(server.tool)
    async def test_tool_with_progress(ctx: Context) -> str:
        for done in (0, 50, 100):
            await ctx.report_progress(done, 100, f"Completed step {done} of 100")
            await asyncio.sleep(STEP_S)
        return "done"

    def nothing() -> str:
        return ""

    @fixture(server.tool)
    async def test_trigger_tool_change(ctx: Context) -> str:
        server.add_tool(nothing, name="test_dynamic_tool")
        server.remove_tool("test_dynamic_tool")
        await ctx.notify_tools_changed()
        return "tool list changed"

    @fixture(server.tool)
    async def test_trigger_prompt_change(ctx: Context) -> str:
        server.add_prompt(Prompt.from_function(nothing, name="test_dynamic_prompt", description="dynamic"))
        server.remove_prompt("test_dynamic_prompt")
        await ctx.notify_prompts_changed()
        return "prompt list changed"


class Response(BaseModel):
    """What test_elicitation asks for."""

    response: str = Field(description="User's response")


class Defaults(BaseModel):
    """A form with a default of every primitive type (SEP-1034)."""

    name: str = "John Doe"
    age: int = 30
    score: float = 95.5
    status: str = Field(default="active", json_schema_extra={"enum": ["active", "inactive", "pending"]})
    verified: bool = True


def titled(**titles: str) -> list[JsonValue]:
    """Choices with titles, as JSON schema has them."""
    return [{"const": const, "title": title} for const, title in titles.items()]


class Choices(BaseModel):
    """A form with every way to write choices (SEP-1330)."""

    untitledSingle: str = Field(json_schema_extra={"enum": ["active", "inactive", "pending"]})
    titledSingle: str = Field(json_schema_extra={"oneOf": titled(low="Low Priority", high="High Priority")})
    untitledMulti: list[str] = Field(
        json_schema_extra={"items": {"type": "string", "enum": ["read", "write", "execute"]}}
    )
    titledMulti: list[str] = Field(json_schema_extra={"items": {"anyOf": titled(feature="New Feature", bug="Bug Fix")}})
    legacyEnum: str = Field(
        json_schema_extra={"enum": ["small", "large"], "enumNames": ["Small Size", "Large Size"]},
    )


def add_questions(server: MCPServer[Any]) -> None:
    """Tools that ask the client by a request of their own, as protocols up to 2025-11-25 allow."""

    @fixture(server.tool)
    async def test_sampling(prompt: str, ctx: Context) -> str:
        message = SamplingMessage(role="user", content=text(prompt))
        # On the call's own stream: the other one may not be open.
        result = await ctx.session.create_message([message], max_tokens=100, related_request_id=ctx.request_id)
        return f"LLM response: {result.content.text if isinstance(result.content, TextContent) else ''}"

    async def ask(ctx: Context, message: str, form: type[BaseModel]) -> str:
        result = await ctx.elicit(message, form)
        content = result.data.model_dump_json() if result.action == "accept" else "{}"
        return f"User response: action={result.action}, content={content}"

    @fixture(server.tool)
    async def test_elicitation(message: str, ctx: Context) -> str:
        return await ask(ctx, message, Response)

    @fixture(server.tool)
    async def test_elicitation_sep1034_defaults(ctx: Context) -> str:
        return await ask(ctx, "Please provide user information", Defaults)

    @fixture(server.tool)
    async def test_elicitation_sep1330_enums(ctx: Context) -> str:
        return await ask(ctx, "Please choose", Choices)

    @fixture(server.tool)
    async def test_missing_capability(ctx: Context) -> str:
        able = ctx.session.client_capabilities
        if able is None or able.sampling is None:
            needed: dict[str, Any] = {"requiredCapabilities": {"sampling": {}}}
            raise MCPError(MISSING_REQUIRED_CLIENT_CAPABILITY, "This tool requires sampling", needed)
        return "The client declared sampling."


def form(message: str, **properties: str) -> ElicitRequest:
    """A request to fill in a form of required fields, given by their types."""
    schema = {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in properties.items()},
        "required": list(properties),
    }
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def sampling(prompt: str) -> CreateMessageRequest:
    """A request to have the client's model answer."""
    message = SamplingMessage(role="user", content=text(prompt))
    return CreateMessageRequest(params=CreateMessageRequestParams(messages=[message], max_tokens=100))


def filled(ctx: Context, key: str, field: str) -> str | None:
    """A field of a form that came back with the call; None if it did not come."""
    content = getattr((ctx.input_responses or {}).get(key), "content", None)
    return str(content[field]) if isinstance(content, dict) and field in content else None


def add_multi_round_trips(server: MCPServer[Any]) -> None:
    """Tools that ask the client by their result, and are called again with the answer (SEP-2322, since 2026-07-28)."""
    needs = InputRequiredResult

    @fixture(server.tool)
    async def test_input_required_result_elicitation(ctx: Context) -> str | InputRequiredResult:
        name = filled(ctx, "user_name", "name")
        return f"Hello, {name}!" if name else needs(input_requests={"user_name": form("Your name?", name="string")})

    @fixture(server.tool)
    async def test_input_required_result_sampling(ctx: Context) -> str | InputRequiredResult:
        answer = (ctx.input_responses or {}).get("capital_question")
        if answer is None:
            return needs(input_requests={"capital_question": sampling("What is the capital of France?")})
        return f"Model said: {answer}"

    @fixture(server.tool)
    async def test_input_required_result_list_roots(ctx: Context) -> str | InputRequiredResult:
        answer = (ctx.input_responses or {}).get("client_roots")
        return needs(input_requests={"client_roots": ListRootsRequest()}) if answer is None else f"Roots: {answer}"


def add_states(server: MCPServer[Any]) -> None:
    """Tools that do the same, and send a state with their question, which comes back with the answer."""
    needs = InputRequiredResult

    @fixture(server.tool)
    async def test_input_required_result_request_state(ctx: Context) -> str | InputRequiredResult:
        if ctx.request_state == "nonce" and "confirm" in (ctx.input_responses or {}):
            return "state-ok: confirmation received"
        return needs(input_requests={"confirm": form("Please confirm", ok="boolean")}, request_state="nonce")

    @fixture(server.tool)
    async def test_input_required_result_tampered_state(ctx: Context) -> str | InputRequiredResult:
        if ctx.request_state is not None:
            return f"state-ok: {ctx.request_state}"
        return needs(input_requests={"confirm": form("Please confirm", ok="boolean")}, request_state="round-1")

    @fixture(server.tool)
    async def test_input_required_result_multiple_inputs(ctx: Context) -> str | InputRequiredResult:
        asked: dict[str, CreateMessageRequest | ListRootsRequest | ElicitRequest] = {
            "user_name": form("Your name?", name="string"),
            "greeting": sampling("Generate a greeting"),
            "client_roots": ListRootsRequest(),
        }
        if asked.keys() <= (ctx.input_responses or {}).keys():
            return "All inputs received."
        return needs(input_requests=asked, request_state="multiple-inputs")

    @fixture(server.tool)
    async def test_input_required_result_multi_round(ctx: Context) -> str | InputRequiredResult:
        name = json.loads(ctx.request_state or "{}").get("name") or filled(ctx, "step1", "name")
        color = filled(ctx, "step2", "color")
        if name is None:
            return needs(input_requests={"step1": form("Your name?", name="string")}, request_state='{"round": 1}')
        if color is None:
            state = json.dumps({"round": 2, "name": name})
            return needs(input_requests={"step2": form("Your favourite colour?", color="string")}, request_state=state)
        return f"{name} likes {color}."

    @fixture(server.tool)
    async def test_input_required_result_capabilities(ctx: Context) -> InputRequiredResult:
        able, asked = ctx.client_capabilities, dict[str, Any]()
        if able is None or able.sampling is not None:
            asked["sample"] = sampling("Say hello")
        if able is None or able.elicitation is not None:
            asked["ask"] = form("Your name?", name="string")
        return needs(input_requests=asked, request_state="capability-gated")


class Computed(BaseModel):
    """What a job of these returns."""

    text: str


def add_tasks(server: MCPServer[Any]) -> None:
    """Tools that go on as jobs of the server's own, and so become tasks for clients that take them."""
    assert isinstance(server, Server), "fixtures come beside our own tools"
    jobs: Jobs = server.service.jobs

    async def answer(ctx: Context, tool: str, work: Work) -> CallToolResult:
        job = jobs.start(tenant(), tool, work)
        jobs.hand_over(job)
        if takes_tasks(ctx.request_context):
            return CallToolResult(content=[], structured_content={"status": "running", "result_id": job.result_id})
        await job.wait(TASK_S)
        return reply(job.result())

    @fixture(server.tool)
    def greet(name: str) -> str:
        return f"Hello, {name}!"

    @fixture(server.tool)
    async def slow_compute(ctx: Context, seconds: float = 0, label: str = "") -> CallToolResult:
        async def compute(report: Any) -> BaseModel:
            await asyncio.sleep(seconds)
            return Computed(text=f"Computed {label} in {seconds:g} s.")

        return await answer(ctx, "slow_compute", compute)

    @fixture(server.tool)
    async def failing_job(ctx: Context) -> CallToolResult:
        async def fail(report: Any) -> BaseModel:
            await asyncio.sleep(1)
            raise InvalidRequest("This job always fails.")

        return await answer(ctx, "failing_job", fail)

    @fixture(server.tool)
    async def protocol_error_job(ctx: Context) -> CallToolResult:
        async def die(report: Any) -> BaseModel:
            raise EngineDead("This job always ends the engine.")

        return await answer(ctx, "protocol_error_job", die)


def add_resources(server: MCPServer[Any]) -> None:
    """Resources of text and bytes, and a template."""

    @server.resource("test://static-text")
    def static_text() -> str:
        return "This is the content of the static text resource."

    @server.resource("test://static-binary")
    def static_binary() -> bytes:
        return base64.b64decode(PNG)

    @server.resource("test://watched-resource")
    def watched() -> str:
        return "Watched resource content"

    @server.resource("test://template/{id}/data")
    def template(id: str) -> str:
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


def add_prompts(server: MCPServer[Any]) -> None:
    """Prompts with and without arguments, and of each kind of content."""

    @fixture(server.prompt)
    def test_simple_prompt() -> list[UserMessage]:
        return [UserMessage(role="user", content=text("This is a simple prompt for testing."))]

    @fixture(server.prompt)
    def test_prompt_with_arguments(arg1: str, arg2: str) -> list[UserMessage]:
        return [UserMessage(role="user", content=text(f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"))]

    @fixture(server.prompt)
    def test_prompt_with_embedded_resource(resourceUri: str) -> list[UserMessage]:
        embedded = resource(resourceUri, "text/plain", "Embedded resource content for testing.")
        return [
            UserMessage(role="user", content=embedded),
            UserMessage(role="user", content=text("Please process the embedded resource above.")),
        ]

    @fixture(server.prompt)
    def test_prompt_with_image() -> list[UserMessage]:
        image = ImageContent(type="image", data=PNG, mime_type="image/png")
        return [
            UserMessage(role="user", content=image),
            UserMessage(role="user", content=text("Please analyze the image above.")),
        ]

    @fixture(server.prompt)
    async def test_input_required_result_prompt(ctx: Context) -> list[UserMessage] | InputRequiredResult:
        context = filled(ctx, "user_context", "context")
        if context is None:
            question = form("What context should the prompt use?", context="string")
            return InputRequiredResult(input_requests={"user_context": question})
        return [UserMessage(role="user", content=text(f"Use the following context: {context}"))]


def add_handlers(server: MCPServer[Any]) -> None:
    """Methods that MCPServer has no public way to serve (mcp 2.3)."""

    async def complete(ref: Any, argument: Any, context: Any) -> Completion:
        return Completion(values=[], total=0, has_more=False)

    untyped: Any = server
    untyped.completion()(complete)

    async def obey(ctx: Any, params: Any) -> EmptyResult:
        return EmptyResult()

    lowlevel = server._lowlevel_server
    lowlevel.add_request_handler("logging/setLevel", SetLevelRequestParams, obey)
    lowlevel.add_request_handler("resources/subscribe", SubscribeRequestParams, obey)
    lowlevel.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, obey)


def main() -> None:
    """Start `mlx-mcp` with the fixtures in every server."""
    build_server = mlx_mcp.api.mcp.server.build_server

    def build_with_fixtures(*args: Any, **kwargs: Any) -> MCPServer[Any]:
        server = build_server(*args, **kwargs)
        add_fixtures(server)
        return server

    mlx_mcp.api.mcp.server.build_server = build_with_fixtures  # before anything else imports it
    from mlx_mcp.__main__ import main

    main()


if __name__ == "__main__":
    main()
