"""What the tools can be called with: checked here, and described for the calling model."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase
from pydantic import BeforeValidator, ConfigDict, Field

from mlx_mcp.api.mcp.as_sent import AsSent, from_json
from mlx_mcp.api.mcp.sampling_arguments import sampling_of, with_sampling
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import AUTO, Grammar, GrammarKind, Reasoning
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.batch import MAX_BRANCHES
from mlx_mcp.service.context import Context
from mlx_mcp.service.files import MAX_FILES
from mlx_mcp.service.generate import Options
from mlx_mcp.service.values import MAX_FORKS, PARAMETERS, SessionOptions


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
    Field(max_length=128, description="Functions in OpenAI's form that the model may ask for in `tool_calls`."),
]


class Arguments(AsSent, ArgModelBase):
    """A tool's arguments, none by default. A tool gets them whole, so that tools can share some by inheritance."""

    model_config = ConfigDict(extra="forbid")

    def model_dump_one_level(self) -> dict[str, Any]:
        """What the SDK calls the tool with."""
        return {"given": self}


class EarlierMessage(AsSent):
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


def chosen(given: Any) -> Any:
    """A choice of tools as a word; in OpenAI's form a function is chosen by an object."""
    match given:
        case {"type": "function", "function": {"name": name}}:
            return name
    return given


class ContextArguments(Arguments):
    """What comes before the prompt."""

    system: Annotated[str, Field(description="System prompt: role and rules; a session has its own already.")] = ""
    files: Annotated[
        list[str] | None,
        Field(
            max_length=MAX_FILES,
            description="Paths of text files that the server reads and puts before the prompt: they cost you nothing.",
        ),
    ] = None
    model: Annotated[str, Field(description="A name from list_models; the default model if left out.")] = ""


class AnswerArguments(ContextArguments):
    """What an answer must look like, beside how it is drawn."""

    json_schema: Annotated[
        dict[str, Any] | None, Field(description="The answer is JSON that obeys this schema, whatever the model.")
    ] = None
    regex: Annotated[str, Field(description="The whole answer matches this (Rust's syntax).")] = ""
    grammar: Annotated[str, Field(description="The answer follows this Lark grammar, from `start`.")] = ""
    reasoning: Annotated[
        Literal["off", "on", "low", "medium", "high"] | None,
        BeforeValidator(switch),
        Field(description="How long a thinking model thinks first; `off`: not. Thoughts are never part of `text`."),
    ] = None

    def asked_reasoning(self) -> Reasoning | None:
        """What is asked for in place of the model's default."""
        return Reasoning(self.reasoning) if self.reasoning else None

    def one_grammar(self) -> Grammar | None:
        """The grammar that the answer obeys.

        Raises:
            InvalidRequest: there are several.
        """
        grammars = {
            GrammarKind.JSON_SCHEMA: "" if self.json_schema is None else json.dumps(self.json_schema),
            GrammarKind.REGEX: self.regex,
            GrammarKind.LARK: self.grammar,
        }
        wanted = [Grammar(kind, source) for kind, source in grammars.items() if source]
        if len(wanted) > 1:
            raise InvalidRequest("Give one of json_schema, regex and grammar, not several.")
        return wanted[0] if wanted else None


@with_sampling()
class GenerateArguments(AnswerArguments):
    """Of `generate`."""

    prompt: Annotated[str, Field(description="What the model should do, with all it needs to know.")] = ""
    messages: Annotated[
        list[EarlierMessage] | None,
        Field(
            max_length=1024, description="Before `prompt`. In a session after tool_calls: what came of them, role tool."
        ),
    ] = None
    session: Annotated[
        str, Field(description="Handle or name of a session that goes on with this prompt; send only what is new.")
    ] = ""
    keep: Annotated[
        bool | None,
        Field(
            description="With `session` true by default; false asks without changing it, and several such calls may "
            "run at once. Without: true opens a session with this call, its handle comes back; false by default."
        ),
    ] = None
    queue: Annotated[
        bool, Field(description="Wait for a turn of the session that is under way, rather than hear session_busy.")
    ] = False
    tools: Functions = None
    tool_choice: Annotated[
        str, BeforeValidator(chosen), Field(description="auto, none, required, or the name of the function to call.")
    ] = ""

    def context(self) -> Context:
        """What the model is told."""
        messages = tuple(message.to_message() for message in self.messages or ())
        prompt = (Message("user", self.prompt),) if self.prompt or not messages else ()
        return Context(self.system, tuple(self.files or ()), messages + prompt)

    def options(self) -> Options:
        """How it is to be answered.

        Raises:
            InvalidRequest: there are several grammars.
        """
        return Options(
            self.model,
            self.session,
            self.keep,
            self.queue,
            tuple(self.tools or ()),
            self.one_grammar(),
            self.asked_reasoning(),
            sampling_of(self),
            self.tool_choice or AUTO,
        )


@with_sampling(without=("logprobs",))
class BatchArguments(AnswerArguments):
    """Of `generate_batch`."""

    prompts: Annotated[
        list[str],
        Field(
            min_length=1, max_length=MAX_BRANCHES, description="One prompt for each branch; they see only their own."
        ),
    ]
    n: Annotated[
        int,
        Field(ge=1, le=MAX_BRANCHES, strict=True, description="Answers to each prompt; several need a temperature."),
    ] = 1
    session: Annotated[str, Field(description="Handle or name of the session that every branch goes on from.")] = ""
    keep: Annotated[bool, Field(description="Keep every branch in a session of its own; the handles come back.")] = (
        False
    )

    def context(self) -> Context:
        """What the model is told before every prompt."""
        return Context(self.system, tuple(self.files or ()))

    def options(self) -> Options:
        """How the prompts are to be answered.

        Raises:
            InvalidRequest: there are several grammars.
        """
        grammar, sampling = self.one_grammar(), sampling_of(self)
        return Options(
            self.model, self.session, self.keep, grammar=grammar, reasoning=self.asked_reasoning(), sampling=sampling
        )


# Arguments that several tools have, in the order in which all show them, after their own.
SHARED = [
    *ContextArguments.model_fields,
    *(name for name, parameter in PARAMETERS.items() if parameter.flag),
    *AnswerArguments.__annotations__,
    *(name for name, parameter in PARAMETERS.items() if not parameter.flag and name != "logprobs"),
]


class CreateArguments(ContextArguments):
    """Of `create_session`."""

    messages: Annotated[
        list[EarlierMessage] | None,
        Field(
            max_length=1024,
            description="Earlier ones, in order; role tool has the call's `name`, and its `id` as call_id. "
            "A last one of the user is what prompts go on.",
        ),
    ] = None
    name: Annotated[
        str,
        Field(description="Stands for the handle in every call: 1 to 64 letters, digits, dots, dashes, underscores."),
    ] = ""
    ttl_s: Annotated[
        float | None,
        Field(gt=0, le=31_536_000, description="Ends after so many seconds without use; the server's default: a day."),
    ] = None
    pinned: Annotated[
        bool, Field(description="Never evict it to make room: it takes memory from all calls until it is closed.")
    ] = False
    ephemeral: Annotated[bool, Field(description="Forget what is cached of it as soon as it is closed or expires.")] = (
        False
    )
    tools: Functions = None

    def context(self) -> Context:
        """What is computed."""
        messages = tuple(message.to_message() for message in self.messages or ())
        return Context(self.system, tuple(self.files or ()), messages)

    def options(self) -> SessionOptions:
        """How the session is kept."""
        return SessionOptions(self.name, self.ttl_s, self.pinned, self.ephemeral)


class ForkArguments(Arguments):
    """Of `fork_session`."""

    session: Annotated[str, Field(description="Handle or name of the session to go on from.")]
    count: Annotated[
        int | None,
        Field(ge=1, le=MAX_FORKS, strict=True, description="How many; one for each of `names`, or one, if left out."),
    ] = None
    names: Annotated[list[str] | None, Field(max_length=MAX_FORKS, description="A name for each.")] = None
    version: Annotated[str, Field(description="Go on from this version, which persist_session made.")] = ""


class PersistArguments(Arguments):
    """Of `persist_session`."""

    session: Annotated[str, Field(description="Handle or name of the session.")]
    version: Annotated[
        str,
        Field(description="Keep a snapshot under this name too, for fork_session."),
    ] = ""


class CloseArguments(Arguments):
    """Of `close_session`."""

    sessions: Annotated[list[str] | None, Field(max_length=1024, description="Handles or names.")] = None
    all: Annotated[bool, Field(description="All of yours but persisted ones, instead of naming them.")] = False
