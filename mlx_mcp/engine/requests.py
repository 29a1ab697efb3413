"""What can be asked of the engine, what may be, and what comes back. Knows no threads and no MLX."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import AUTO, Grammar, Reasoning
from mlx_mcp.core.cache.misses import MissReason
from mlx_mcp.core.ports import LoadedModel
from mlx_mcp.core.sampling import NEUTRAL, PARAMETERS, Sampling
from mlx_mcp.core.sequence import FinishReason, SamplingParams
from mlx_mcp.core.session import SessionInfo, SessionOptions
from mlx_mcp.errors import InvalidRequest, PromptTooLong

DEFAULT_MAX_TOKENS = 512
EMPTY = "The prompt is empty. Say in `prompt` what the model should do."
ALIKE = "At temperature 0 all n answers are the same. Give a temperature, say 0.8, or n=1."


@dataclass(eq=False)
class Ending:
    """Ends a generation early, and keeps what it has written as its answer and, where it has one, in its session.

    For one generation, on the event loop of its caller. One that has no row yet ends as soon as it has one, without a
    token. A generation that is ended so has the finish reason "length".
    """

    wanted: bool = False
    wake: Callable[[], None] | None = None  # has the generation look at once; it sets this itself

    def end(self) -> None:
        """End the generation; the second time does nothing."""
        if not self.wanted:
            self.wanted = True
            if self.wake is not None:
                self.wake()


@dataclass(frozen=True)
class GenerateRequest:
    """One completion.

    `tools` are function definitions in OpenAI's form; `reasoning` None leaves it to the model. A `grammar` holds all of
    the text, which then has neither reasoning nor tool calls.
    """

    messages: tuple[Message, ...]
    model: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    lane: str = ""  # calls of one lane share a turn when there is not room for all
    grammar: Grammar | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = AUTO  # or none, required, or the name of a tool
    reasoning: Reasoning | None = None
    who: str = ""  # what the client calls itself, for the session's record of its turns
    tenant: str = ""  # sessions are their tenant's, and only prompts of one tenant share keys and values
    session: str = ""  # handle or name: the last message is the next turn of this session
    keep: bool = True  # whether the session goes on with the answer; else it stays as it is
    queue: bool = False  # wait for a turn of the session that is under way, rather than fail
    opens: SessionOptions | None = None  # keep prompt and answer in a new session
    drawn: bool = False  # one of several answers to the same prompt, which a greedy model would give alike
    context: bool = False  # no answer: the new session has the messages, the last of which stays open
    raw: str | None = None  # the prompt as it is, in place of messages; no chat template is put around it
    shorten: bool = False  # lower max_tokens to what context and memory leave, rather than refuse
    ending: Ending = field(default_factory=Ending, compare=False)  # by which whoever asks can end it early


@dataclass(frozen=True)
class Progress:
    """Where the call is: `phase` is loading, queued, prefill or decode; `done` of `total` once that is known.

    `unit` is "bytes" while a model is fetched or its weights are read, else "tokens". `num_prompt` are the prompt's
    tokens, those of its session included, once the engine has it, and `num_cached` those of them that were there
    already, once that is known. While the prompt is read, `admitted_at` says since when, by time.monotonic.
    """

    phase: str
    message: str
    done: int = 0
    total: int | None = None
    unit: str = "tokens"
    num_prompt: int | None = None
    num_cached: int | None = None
    admitted_at: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Delta:
    """New text; a tool call comes whole, in the model's own notation."""

    text: str
    num_tokens: int
    kind: TextKind = TextKind.ANSWER


@dataclass(frozen=True)
class TokenChoice:
    """A token of the output, and the likeliest ones in its place."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()  # token id, text, log-probability; likeliest first


@dataclass(frozen=True)
class CacheMiss:
    """Why more was computed than was to be expected: see MissReason.

    From token `index` on; `before` is the text that leads there, `after` how this prompt goes on, and `earlier` how the
    one went on that it was compared with. `detail` is why nothing of the model is reused.
    """

    reason: MissReason
    index: int
    before: str
    after: str
    earlier: str
    detail: str


@dataclass(frozen=True)
class Result:
    """The whole answer and what it took.

    `text` is the answer without `reasoning` and `tool_calls`; `logprobs`, if asked for, are of every token of these. Of
    the prompt's tokens, those of its session included, `cached_tokens` were in memory, `restored_tokens` came from
    disk, and the others were computed. `stop_string` is the one that ended the answer, if one did. `notes` are whole
    sentences for the caller, each once.
    """

    text: str
    finish_reason: FinishReason
    model: str
    prompt_tokens: int
    completion_tokens: int
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenChoice, ...] = ()
    cached_tokens: int = 0
    restored_tokens: int = 0
    miss: CacheMiss | None = None
    session: SessionInfo | None = None  # that the answer is kept in
    notes: tuple[str, ...] = ()
    stop_string: str = ""


Update = Progress | Delta | Result


@dataclass(frozen=True)
class Count:
    """How many tokens a prompt has, its session's included, and how many the model's context has."""

    prompt_tokens: int
    context_tokens: int
    model: str
    notes: tuple[str, ...] = ()


def check(request: GenerateRequest) -> None:
    """Refuse what cannot be carried out, before anything is loaded for it.

    Raises:
        InvalidRequest: with the argument's name and what it may be.
    """
    if any(message.images for message in request.messages):
        raise InvalidRequest("The models here cannot see: leave images out, and describe in `prompt` what they show.")
    if request.raw is not None:
        told = (request.messages, request.tools, request.session, request.opens)
        assert not any(told), "a raw prompt is all that the model is given, and begins no session"
        if not request.raw:
            raise InvalidRequest(EMPTY)
    elif request.context:
        if not any(message.text.strip() for message in request.messages):
            raise InvalidRequest("The context is empty. Give `system`, `files` or `messages`.")
    else:
        check_last(request.messages)
    has_system = any(message.role == "system" for message in request.messages)
    if request.session and (has_system or request.tools or request.opens or request.context):
        raise InvalidRequest(
            "`system` and `tools` belong to a session from its beginning: leave them out of its turns."
        )
    check_results(request.messages, goes_on=bool(request.session))
    if request.queue and not request.session:
        raise InvalidRequest(
            "`queue` waits for a turn of a session, and there is no `session`: give one, or no `queue`."
        )
    check_sampling(request.sampling)
    if request.grammar is not None and (request.tools or request.sampling.stop):
        other = "tools" if request.tools else "stop"
        raise InvalidRequest(f"`{other}` and a grammar cannot go together, it would not be obeyed: leave one out.")
    check_tools(request.tools)


def check_last(messages: tuple[Message, ...]) -> None:
    """Refuse messages that leave nothing to answer.

    Raises:
        InvalidRequest: with what to give.
    """
    last = messages[-1] if messages else Message("user")
    if last.role == "assistant":
        raise InvalidRequest("The last message is the model's own. Say in `prompt` what it should do now.")
    if last.role != "tool" and not any(message.text.strip() for message in messages if message.role != "system"):
        raise InvalidRequest(EMPTY)


def check_results(messages: tuple[Message, ...], goes_on: bool) -> None:
    """Refuse tools' results that nothing asked for; a turn that `goes_on` may begin with those of the last answer.

    Raises:
        InvalidRequest: with where a result belongs.
    """
    for before, message in zip((None, *messages), messages, strict=False):
        if message.role != "tool":
            continue
        asked = goes_on if before is None else before.role == "tool" or bool(before.tool_calls)
        if not asked:
            raise InvalidRequest(
                "A tool's result must be right after the answer that asked for it: first in a turn of that answer's "
                "session, or after the assistant's message with `tool_calls`."
            )
        if not message.name:
            raise InvalidRequest("A tool's result has no `name`: give the name of the tool that was called.")


def check_sampling(sampling: Sampling) -> None:
    """Refuse parameters that cannot be.

    Raises:
        InvalidRequest: with the parameter's name and what it may be.
    """
    for name, parameter in PARAMETERS.items():
        value = getattr(sampling, name)
        if parameter.words and not parameter.bounds.hold(value):
            raise InvalidRequest(f"{name} is {value}; it must be {parameter.words}.")
    if any(not stop for stop in sampling.stop):
        raise InvalidRequest("A stop string is empty; leave it out.")
    biased = [token_id for token_id, _ in sampling.logit_bias]
    limits = PARAMETERS["logit_bias"].bounds
    if not limits.hold(biased):
        raise InvalidRequest(f"logit_bias has {len(biased)} entries; it may have {limits.max_length}.")
    if len(set(biased)) < len(biased):
        raise InvalidRequest("logit_bias names a token id twice; leave one out.")
    for token_id, bias in sampling.logit_bias:
        if token_id < 0 or not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias has {bias} for token id {token_id}; ids must be 0 or more, biases from -100 to 100."
            )


def check_tools(tools: tuple[dict[str, Any], ...]) -> None:
    """Refuse what is no list of functions in OpenAI's form.

    Raises:
        InvalidRequest: with the function's name and how to write it.
    """
    names: set[str] = set()
    for tool in tools:
        function: Any = tool.get("function")
        name: Any = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise InvalidRequest(
                'A tool has no function name; write {"type": "function", "function": {"name": …, "description": …, '
                '"parameters": …}}.'
            )
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict) or not isinstance(parameters.get("properties") or {}, dict):
            raise InvalidRequest(
                f"The parameters of tool {name[:80]!r} are no JSON schema of an object; write "
                '{"type": "object", "properties": {…}}.'
            )
        if name in names:
            raise InvalidRequest(f"Two tools are named {name[:80]!r}; rename one.")
        names.add(name)


def sampling_params(request: GenerateRequest, num_prompt: int, model: LoadedModel) -> SamplingParams:
    """The request's sampling parameters, with those settled that it leaves open.

    `max_tokens` is settled against the model's context, and how tokens are drawn by what the model's makers recommend.

    Raises:
        PromptTooLong: prompt and answer do not fit.
        InvalidRequest: logit_bias has an id that the model does not have, or several answers would be alike.
    """
    sampling, room = request.sampling, model.context_tokens - num_prompt
    asked = None if request.context else sampling.max_tokens
    max_tokens = sampling.max_tokens or max(1, min(DEFAULT_MAX_TOKENS, room))
    if request.shorten:
        asked, max_tokens = None, min(max_tokens, max(1, room))
    if max_tokens > room:
        raise PromptTooLong(num_prompt, asked, model.context_tokens)
    for token_id, _ in sampling.logit_bias:
        if token_id >= model.vocab_size:
            raise InvalidRequest(
                f"logit_bias has token id {token_id}; the ids of {model.name!r} go up to {model.vocab_size - 1}."
            )
    seed = random.getrandbits(32) if sampling.seed is None else sampling.seed
    settled: dict[str, Any] = {name: model.defaults.get(name, neutral) for name, neutral in NEUTRAL.items()}
    settled |= {name: value for name, value in vars(sampling).items() if value is not None or name not in NEUTRAL}
    if request.drawn and settled["temperature"] == 0:
        raise InvalidRequest(ALIKE)
    return SamplingParams(**settled | {"max_tokens": max_tokens, "seed": seed})


def without_tokens(params: SamplingParams, token_ids: tuple[int, ...]) -> SamplingParams:
    """The parameters, by which none of these tokens is ever drawn."""
    others = tuple((token_id, bias) for token_id, bias in params.logit_bias if token_id not in token_ids)
    return replace(params, logit_bias=others + tuple((token_id, -math.inf) for token_id in token_ids))
