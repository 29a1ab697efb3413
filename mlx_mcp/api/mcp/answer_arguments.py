"""What can be said to the tools that generate: what the model is told, and how it is to answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlx_mcp.api.mcp.arguments import ContextArguments, EarlierMessage, Functions, chosen, option, switch
from mlx_mcp.api.mcp.sampling_arguments import DAILY, with_sampling
from mlx_mcp.api.web.given import one_grammar
from mlx_mcp.api.web.sampling import sampling_of
from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import AUTO, Grammar, Reasoning
from mlx_mcp.service.batch import MAX_BRANCHES
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options


class AnswerArguments(ContextArguments):
    """What an answer must look like, beside how it is drawn."""

    json_schema: Annotated[dict[str, Any] | None, Field(description="The answer is JSON that obeys it.")] = None
    regex: Annotated[str, Field(json_schema_extra=option("regex that the whole answer matches"))] = ""
    grammar: Annotated[str, Field(json_schema_extra=option("grammar (Lark) of the answer"))] = ""
    reasoning: Annotated[
        Literal["off", "on", "low", "medium", "high"] | None,
        BeforeValidator(switch),
        Field(json_schema_extra=option("reasoning (off, on, low, medium, high)")),
    ] = None

    def asked_reasoning(self) -> Reasoning | None:
        """What is asked for in place of the model's default."""
        return Reasoning(self.reasoning) if self.reasoning else None

    def held_to(self) -> Grammar | None:
        """The grammar that the answer obeys.

        Raises:
            InvalidRequest: there are several.
        """
        return one_grammar(self.json_schema, self.regex, self.grammar)


@with_sampling()
class GenerateArguments(AnswerArguments):
    """Of `generate`."""

    prompt: Annotated[str, Field(description="What the model should do, with all it needs to know.")] = ""
    messages: Annotated[
        list[EarlierMessage] | None,
        Field(max_length=1024, description="Come before `prompt`, as results of tool_calls do."),
    ] = None
    session: Annotated[str, Field(description="Handle or name of a session to go on with; send only what is new.")] = ""
    keep: Annotated[
        bool | None,
        Field(description="false: leave the `session` as it is; true without one: open a session with this call."),
    ] = None
    queue: Annotated[bool, Field(json_schema_extra=option("queue (true: wait for a busy session)"))] = False
    tools: Functions = None
    tool_choice: Annotated[
        str,
        BeforeValidator(chosen),
        Field(json_schema_extra=option("tool_choice")),
    ] = ""

    def context(self) -> Context:
        """What the model is told."""
        messages = tuple(message.to_message() for message in self.messages or ())
        prompt = (Message("user", self.prompt),) if self.prompt or not messages else ()
        return Context(self.system, tuple(self.files or ()), messages + prompt)

    def how(self) -> Options:
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
            self.held_to(),
            self.asked_reasoning(),
            sampling_of(self),
            self.tool_choice or AUTO,
        )


@with_sampling(without=("logprobs",))
class BatchArguments(AnswerArguments):
    """Of `generate_batch`."""

    prompts: Annotated[
        list[str],
        Field(min_length=1, max_length=MAX_BRANCHES, description="One for each branch, which sees only its own."),
    ]
    n: Annotated[
        int, Field(ge=1, le=MAX_BRANCHES, strict=True, description="Answers to each prompt, with a temperature.")
    ] = 1
    session: Annotated[str, Field(description="Handle or name of the session that every branch goes on from.")] = ""
    keep: Annotated[bool, Field(description="Keep every branch as a session; the handles come back.")] = False

    def context(self) -> Context:
        """What the model is told before every prompt."""
        return Context(self.system, tuple(self.files or ()))

    def how(self) -> Options:
        """How the prompts are to be answered.

        Raises:
            InvalidRequest: there are several grammars.
        """
        grammar, sampling = self.held_to(), sampling_of(self)
        return Options(
            self.model, self.session, self.keep, grammar=grammar, reasoning=self.asked_reasoning(), sampling=sampling
        )


class CountArguments(ContextArguments):
    """Of `count_tokens`."""

    prompt: Annotated[str, Field(description="As for generate.")] = ""
    messages: Annotated[list[EarlierMessage] | None, Field(max_length=1024, description="As for generate.")] = None
    session: Annotated[str, Field(description="Count as its next turn.")] = ""
    tools: Functions = None

    def context(self) -> Context:
        """What the model would be told."""
        messages = tuple(message.to_message() for message in self.messages or ())
        prompt = (Message("user", self.prompt),) if self.prompt or not messages else ()
        return Context(self.system, tuple(self.files or ()), messages + prompt)

    def how(self) -> Options:
        """Which model and session it is counted for."""
        return Options(self.model, self.session, False, tools=tuple(self.tools or ()))


# Arguments that several tools have, in the order in which all show them, after their own.
SHARED = ["system", "files", "json_schema", *DAILY, "model", "wait_s"]
