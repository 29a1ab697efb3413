"""What can be sent to the API: bodies, queries and headers, checked to the letter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mlx_mcp.api.web.given import GivenMessage, one_grammar
from mlx_mcp.api.web.sampling import sampling_of, with_sampling
from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import AUTO, Grammar, Reasoning
from mlx_mcp.service.batch import MAX_BRANCHES
from mlx_mcp.service.context import Context
from mlx_mcp.service.files import MAX_FILES
from mlx_mcp.service.generate import Options
from mlx_mcp.service.values import MAX_FORKS, SessionOptions

MAX_KEY = 255  # characters
MAX_PAGE = 1000  # sessions
YEAR_S = 31_536_000

Messages = Annotated[list[GivenMessage], Field(max_length=1024)]
Files = Annotated[
    list[str], Field(max_length=MAX_FILES, description="Paths of text files that the server reads, in allowed folders.")
]
Functions = Annotated[
    list[dict[str, Any]], Field(max_length=128, description="Functions in OpenAI's form, which the model may call.")
]
ModelName = Annotated[str, Field(description="A name or alias of a model; the default model if left out.")]


class Body(BaseModel):
    """A body. What it does not know is refused, and null stands for what is left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        """The members that are not null, and those that nobody knows."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class LongBody(Body):
    """Of a call that may go on after its answer."""

    wait_s: Annotated[
        float | None,
        Field(
            ge=0,
            le=86_400,
            description="Answer after so many seconds, with status 202 and a result_id if the call still runs. Without "
            "it the answer comes when the call has ended.",
        ),
    ] = None


class CreateBody(LongBody):
    """A context to compute once."""

    system: Annotated[str, Field(description="The system prompt.")] = ""
    files: Files = []
    messages: Annotated[Messages, Field(description="Earlier messages; prompts go on a last one of the user.")] = []
    tools: Functions = []
    model: ModelName = ""
    name: Annotated[
        str, Field(description="Stands for the handle: 1 to 64 letters, digits, dots, dashes, underscores.")
    ] = ""
    ttl_s: Annotated[
        float | None, Field(gt=0, le=YEAR_S, description="The session ends after so many seconds without use.")
    ] = None
    pinned: Annotated[bool, Field(description="Its keys and values are never evicted, at the cost of others.")] = False
    ephemeral: Annotated[bool, Field(description="What is cached of it goes at its end.")] = False

    def context(self) -> Context:
        """What is computed."""
        return Context(self.system, tuple(self.files), tuple(each.to_message() for each in self.messages))

    def how(self) -> SessionOptions:
        """How the session is kept."""
        return SessionOptions(self.name, self.ttl_s, self.pinned, self.ephemeral)


class ForkBody(Body):
    """How many sessions go on from another one."""

    count: Annotated[
        int | None, Field(ge=1, le=MAX_FORKS, description="How many; if left out, one for each name, or one.")
    ] = None
    names: Annotated[list[str], Field(max_length=MAX_FORKS, description="A name for each.")] = []
    version: Annotated[str, Field(description="Go on from this version, which was persisted under that name.")] = ""


class PersistBody(LongBody):
    """What is made durable."""

    version: Annotated[str, Field(description="Keep a snapshot under this name too, to fork from.")] = ""


class AnswerBody(LongBody):
    """What an answer must look like, beside how it is drawn."""

    json_schema: Annotated[dict[str, Any] | None, Field(description="The answer is JSON that obeys this schema.")] = (
        None
    )
    regex: Annotated[str, Field(description="The whole answer matches this regular expression.")] = ""
    grammar: Annotated[str, Field(description="The answer obeys this Lark grammar.")] = ""
    reasoning: Annotated[
        Literal["off", "on", "low", "medium", "high"] | None,
        Field(description="How long the model thinks before it answers; the model's own way if left out."),
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
class GenerateBody(AnswerBody):
    """The next turn of a session."""

    prompt: Annotated[str, Field(description="What the user says.")] = ""
    messages: Annotated[Messages, Field(description="Come before `prompt`, as results of tool_calls do.")] = []
    keep: Annotated[bool, Field(description="false: leave the session as it is.")] = True
    queue: Annotated[bool, Field(description="true: wait for a turn of the session that is under way.")] = False
    tool_choice: Annotated[str, Field(description='"auto", "none", "required", or the name of a function.')] = AUTO
    stream: Annotated[bool, Field(description="true: answer with a stream of events.")] = False

    def context(self) -> Context:
        """What is said to the model."""
        messages = tuple(each.to_message() for each in self.messages)
        prompt = (Message("user", self.prompt),) if self.prompt or not messages else ()
        return Context(messages=messages + prompt)

    def how(self, session: str) -> Options:
        """How it is to be answered in a session.

        Raises:
            InvalidRequest: there are several grammars.
        """
        return Options(
            session=session,
            keep=self.keep,
            queue=self.queue,
            grammar=self.held_to(),
            reasoning=self.asked_reasoning(),
            sampling=sampling_of(self),
            tool_choice=self.tool_choice or AUTO,
        )


@with_sampling(without=("logprobs",))
class BatchBody(AnswerBody):
    """Many prompts over one context."""

    prompts: Annotated[
        list[str],
        Field(min_length=1, max_length=MAX_BRANCHES, description="One for each branch, which sees only its own."),
    ]
    n: Annotated[int, Field(ge=1, le=MAX_BRANCHES, description="Answers to each prompt, with a temperature.")] = 1
    session: Annotated[str, Field(description="Handle or name of the session that every branch goes on from.")] = ""
    system: Annotated[str, Field(description="The system prompt; a session has its own already.")] = ""
    files: Files = []
    messages: Annotated[Messages, Field(description="Come before every prompt.")] = []
    model: ModelName = ""
    keep: Annotated[bool, Field(description="Keep every branch as a session; the answer has the handles.")] = False

    def context(self) -> Context:
        """What the model is told before every prompt."""
        return Context(self.system, tuple(self.files), tuple(each.to_message() for each in self.messages))

    def how(self) -> Options:
        """How the prompts are to be answered.

        Raises:
            InvalidRequest: there are several grammars.
        """
        return Options(
            self.model,
            self.session,
            self.keep,
            grammar=self.held_to(),
            reasoning=self.asked_reasoning(),
            sampling=sampling_of(self),
        )


class Query(BaseModel):
    """What an address says after its question mark. What it does not know is refused."""

    model_config = ConfigDict(extra="forbid")


class PageQuery(Query):
    """Which of the sessions are listed."""

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE, description="How many at most.")] = 100
    after: Annotated[str, Field(description="List those that come after this one: `next` of the page before.")] = ""


class DetailQuery(Query):
    """What is told of a session."""

    transcript: Annotated[bool, Field(description="Whether what was said in it is told too.")] = False


class ResultQuery(Query):
    """How long a result is waited for."""

    wait_s: Annotated[float, Field(ge=0, le=86_400, description="Answer after so many seconds at the latest.")] = 0


class KeyHeader(BaseModel):
    """The header that makes a call safe to repeat."""

    key: Annotated[
        str | None,
        Field(
            alias="Idempotency-Key",
            min_length=1,
            max_length=MAX_KEY,
            description="A text of your own for this call. The same call with the same key is done once: a repeat gets "
            "the answer of the first, until that is an hour old.",
        ),
    ] = None
