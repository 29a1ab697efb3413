"""The tools, as a calling model sees them."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import wraps
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import anyio
from mcp import MCPError
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp_types import INTERNAL_ERROR, CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from mlx_mcp.core.ports import Grammar, GrammarKind, Message
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.requests import Delta, GenerateRequest, Progress, Result
from mlx_mcp.errors import EngineDead, InvalidRequest, MlxMcpError
from mlx_mcp.models.registry import Registry

MAX_TOKENS = 131_072
PROGRESS_INTERVAL_S = 0.1  # each notification costs about 0.5 ms of the event loop
PROGRESS_CHARS = 160  # hosts cut the message at 200
# A text that may be left out or null. Not `str | None`: of those the SDK parses what reads as JSON, such as the regular
# expression "[0]", and then finds that it is no text.
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
P = ParamSpec("P")
R = TypeVar("R")
EMBEDDED_NOTE = (
    "No model is configured, so the built-in one of 0.9M parameters answered: it recalls what it is told and no more. "
    "For real work have the server started as `mlx-mcp serve --model FOLDER_OR_HUB_ID`."
)
READ_ONLY = {"read_only_hint": True, "destructive_hint": False, "open_world_hint": False}


class CalledTool(BaseModel):
    """A call that the local model asks for; nobody has carried it out."""

    name: str
    arguments: dict[str, Any]


class LikelyToken(BaseModel):
    """A token of the answer: how it reads, its log-probability, and the likeliest ones in its place."""

    token: str
    logprob: float
    top: list[tuple[str, float]]


class Generation(BaseModel):
    """What `generate` returns. Hosts show a model this and nothing else, so it is small."""

    text: str
    finish_reason: Literal["stop", "length", "tool_calls"]
    model: str
    prompt_tokens: int
    completion_tokens: int
    reasoning: str | None = None
    tool_calls: list[CalledTool] | None = None
    logprobs: list[LikelyToken] | None = None
    note: str | None = None


class ModelEntry(BaseModel):
    """One model of `list_models`."""

    name: str
    default: bool
    loaded: bool
    weights_mb: float | None
    context_tokens: int | None
    about: str


class ModelList(BaseModel):
    """What `list_models` returns."""

    models: list[ModelEntry]


class StrictTool(Tool):
    """A tool whose arguments are checked to the letter, and whose refusals say what to change.

    The SDK ignores arguments it does not know, so that a typo silently falls back to a default, and reports a bad value
    with a link to pydantic's documentation.
    """

    @classmethod
    def make(cls, function: Callable[..., Any], title: str, **annotations: bool) -> StrictTool:
        """A tool of an async function; its docstring is the description."""
        tool = cls.from_function(
            function,
            title=title,
            description=inspect.cleandoc(function.__doc__ or ""),
            annotations=ToolAnnotations(title=title, **READ_ONLY, **annotations),
            meta={"anthropic/alwaysLoad": True},
        )
        assert isinstance(tool, StrictTool)
        model = tool.fn_metadata.arg_model
        model.model_config["extra"] = "forbid"
        model.model_rebuild(force=True)
        tool.parameters = model.model_json_schema(by_alias=True)
        return tool

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        """Run the tool; see `Tool.run`."""
        try:
            return await super().run(arguments, context, convert_result)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError):
                raise ToolError(f"{self.name} was not called right: {advice(error.__cause__)}") from error
            raise


def advice(error: ValidationError) -> str:
    """What is wrong with which argument, in one line; long values are cut."""
    faults = []
    for fault in error.errors(include_url=False):
        name = ".".join(map(str, fault["loc"]))
        given = "" if fault["type"] == "missing" else f" (given: {fault['input']!r:.80})"
        faults.append(f"{name}: {fault['msg']}{given}")
    return "; ".join(faults) + ". Correct the arguments and call again."


def translated(tool: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Turn this package's errors into the protocol's; the one place where that is done."""

    @wraps(tool)
    async def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await tool(*args, **kwargs)
        except EngineDead as error:
            raise MCPError(INTERNAL_ERROR, str(error)) from error  # no other arguments could help
        except MlxMcpError as error:
            raise ToolError(str(error)) from error

    return run


class ProgressReporter:
    """Sends progress to the host, at most ten times a second and always upwards, as the protocol wants."""

    def __init__(self, context: Context[Any, Any]) -> None:
        self._context = context
        self._last = 0.0
        self._value = 0.0
        self._total: int | None = None
        self._read = 0  # tokens of the prompt
        self._tail = ""

    async def show(self, update: Progress | Delta) -> None:
        """Report an update, unless one was reported a moment ago."""
        if isinstance(update, Delta):
            self._tail = (self._tail + update.text)[-PROGRESS_CHARS:]
        else:
            self._total = update.total
            self._read = update.done if update.phase == "prefill" else self._read
        now = time.monotonic()
        if now - self._last < PROGRESS_INTERVAL_S:
            return
        self._last = now
        done = self._read + update.num_tokens if isinstance(update, Delta) else update.done
        message = self._tail or (update.message if isinstance(update, Progress) else "")
        # A value that stands still is raised by a hair: hosts take it as a sign of life.
        self._value = max(float(done), self._value + 1e-3)
        await self._context.report_progress(self._value, self._total, message)


@asynccontextmanager
async def cancelled_on_disconnect(context: Context[Any, Any]) -> AsyncIterator[None]:
    """Cancel the body when its HTTP client goes away.

    Newer protocol versions do this in the SDK; for older ones the SDK goes on for a client that can never come back to
    the answer, since no events are stored.
    """
    request = context.request_context.request
    if request is None or not hasattr(request, "receive"):
        yield
        return
    # A scope and a task, not a task group: that would wrap the body's errors.
    with anyio.CancelScope() as scope:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            scope.cancel()

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()


def make_tools(client: EngineClient, registry: Registry) -> list[Tool]:
    """The tools over one engine client, in the order in which hosts show them."""

    @translated
    async def generate(
        prompt: Annotated[str, Field(description="What the model should do, with all it needs to know.")],
        ctx: Context,
        system: Annotated[Text, Field(description="System prompt: role and rules.")] = "",
        model: Annotated[Text, Field(description="A name from list_models; the default model if left out.")] = "",
        max_tokens: Annotated[
            int | None,
            Field(
                ge=1,
                le=MAX_TOKENS,
                strict=True,
                description="Longest answer, in tokens; 512 or what the context leaves if left out.",
            ),
        ] = None,
        temperature: Annotated[
            float, Field(ge=0, le=5, description="0 takes the likeliest token each time; higher is more varied.")
        ] = 0.0,
        top_p: Annotated[
            float, Field(gt=0, le=1, description="Draw only from the likeliest tokens that together reach this.")
        ] = 1.0,
        stop: Annotated[
            list[str] | None, Field(max_length=16, description="Strings that end the answer; not part of it.")
        ] = None,
        seed: Annotated[
            int | None,
            Field(ge=0, le=2**32 - 1, strict=True, description="The same seed gives the same text for the same call."),
        ] = None,
        json_schema: Annotated[
            dict[str, Any] | None, Field(description="The answer is JSON that obeys this schema, whatever the model.")
        ] = None,
        regex: Annotated[Text, Field(description="The whole answer matches this (Rust's syntax).")] = "",
        grammar: Annotated[Text, Field(description="The answer follows this Lark grammar, from `start`.")] = "",
        tools: Annotated[
            list[dict[str, Any]] | None,
            Field(max_length=128, description="Functions in OpenAI's form that the model may ask for in `tool_calls`."),
        ] = None,
        reasoning: Annotated[
            bool, Field(description="False asks a thinking model to answer at once; thoughts are never part of `text`.")
        ] = True,
        top_k: Annotated[
            int, Field(ge=0, strict=True, description="Draw only from so many of the likeliest tokens; 0: all.")
        ] = 0,
        min_p: Annotated[
            float,
            Field(ge=0, le=1, description="Draw only from tokens at least this fraction as likely as the likeliest."),
        ] = 0.0,
        repetition_penalty: Annotated[
            float, Field(ge=0.01, le=10, description="Above 1: tokens of prompt and answer become less likely.")
        ] = 1.0,
        presence_penalty: Annotated[
            float, Field(ge=-2, le=2, description="Above 0: tokens of the answer become less likely.")
        ] = 0.0,
        frequency_penalty: Annotated[
            float, Field(ge=-2, le=2, description="Above 0: the more often a token was in the answer, the less likely.")
        ] = 0.0,
        logit_bias: Annotated[
            dict[int, float] | None,
            Field(max_length=1024, description="Token id to what is added to its logit, from -100 (never) to 100."),
        ] = None,
        logprobs: Annotated[
            int | None,
            Field(ge=0, le=20, strict=True, description="Return log-probabilities, with so many alternatives a token."),
        ] = None,
    ) -> Annotated[CallToolResult, Generation]:
        """Generate text with a language model that runs on this machine; nothing leaves it.

        Use it to hand off work that needs no further tools: summaries, drafts, extraction, classification, a second
        opinion; calls may run in parallel. The model sees nothing but `system` and `prompt`: no files, no earlier
        calls. For data rather than prose give `json_schema`, `regex` or `grammar`: the answer then always parses,
        unless finish_reason is "length", which means that max_tokens cut it off. Returns {text, finish_reason, model,
        prompt_tokens, completion_tokens}, and {reasoning}, {tool_calls} or {logprobs} where there are any. The first
        call to a model loads it, which can take minutes; progress is reported.
        """
        grammars = {
            GrammarKind.JSON_SCHEMA: "" if json_schema is None else json.dumps(json_schema),
            GrammarKind.REGEX: regex,
            GrammarKind.LARK: grammar,
        }
        wanted = [Grammar(kind, source) for kind, source in grammars.items() if source]
        if len(wanted) > 1:
            raise InvalidRequest("Give one of json_schema, regex and grammar, not several.")
        messages = (Message("system", system),) if system else ()
        request = GenerateRequest(
            messages=(*messages, Message("user", prompt)),
            model=model or None,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=tuple(stop or ()),
            seed=seed,
            grammar=wanted[0] if wanted else None,
            tools=tuple(tools or ()),
            reasoning=reasoning,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=tuple((logit_bias or {}).items()),
            logprobs=logprobs,
        )
        result: Result | None = None
        async with cancelled_on_disconnect(ctx):
            result = await follow(client, request, ProgressReporter(ctx))
        if result is None:
            raise ToolError("The client disconnected.")
        by_default = not model and registry.nothing_configured
        generation = Generation(
            text=result.text,
            finish_reason=result.finish_reason.value,
            model=result.model,
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            reasoning=result.reasoning or None,
            tool_calls=[CalledTool(name=c.name, arguments=c.arguments) for c in result.tool_calls] or None,
            logprobs=[
                LikelyToken(token=c.text, logprob=c.logprob, top=[(text, logprob) for _, text, logprob in c.top])
                for c in result.logprobs
            ]
            or None,
            note=EMBEDDED_NOTE if by_default else None,
        )
        return CallToolResult(
            content=[TextContent(type="text", text=result.text)],
            structured_content=generation.model_dump(exclude_none=True),
        )

    @translated
    async def list_models(ctx: Context) -> ModelList:
        """List the models that `generate` can use: name, size, context length, and whether each is loaded.

        Call it to choose a model or after "model not found". The one with `default` answers when no model is named; one
        that is not loaded takes longer at its first call. Returns {models: [...]}.
        """
        loaded = client.stats.models
        entries = await asyncio.to_thread(registry.entries)
        return ModelList(
            models=[
                ModelEntry(
                    name=entry.spec.name,
                    default=entry.default,
                    loaded=entry.spec.name in loaded,
                    weights_mb=None if entry.weights_bytes is None else round(entry.weights_bytes / 1e6, 1),
                    context_tokens=entry.context_tokens,
                    about=entry.spec.summary,
                )
                for entry in entries
            ]
        )

    return [
        # Hosts run the calls of one turn in parallel only for read-only tools; generating changes nothing of a user's.
        StrictTool.make(generate, "Generate text", idempotent_hint=False),
        StrictTool.make(list_models, "List models", idempotent_hint=True),
    ]


async def follow(client: EngineClient, request: GenerateRequest, progress: ProgressReporter) -> Result:
    """Run a request to its end, reporting its progress; a cancelled caller frees the row."""
    async with aclosing(client.generate(request)) as updates:
        async for update in updates:
            if isinstance(update, Result):
                return update
            await progress.show(update)
    raise AssertionError("a generation ends with a result or an error")
