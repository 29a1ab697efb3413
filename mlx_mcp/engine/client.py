"""The engine as an event loop sees it: one async call per generation.

Owns what lies between text and tokens: loading on first use, the chat template, grammars, streaming text, stop strings,
and cancelling the row when the caller goes away. Knows nothing of MCP or MLX.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.core.ports import (
    Grammar,
    LoadedModel,
    Message,
    ModelLoader,
    ModelRegistry,
    ModelSpec,
    Piece,
    PreparedModel,
    Prompt,
    TextKind,
    ToolCall,
)
from mlx_mcp.core.sequence import FinishReason, SamplingParams
from mlx_mcp.core.stop_strings import StopStrings
from mlx_mcp.engine.messages import (
    Cancel,
    Event,
    Failed,
    Find,
    Finished,
    Load,
    Loaded,
    Loading,
    Prefilled,
    Submit,
    Token,
    Unloaded,
    Waiting,
)
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import EngineDead, InvalidRequest, MlxMcpError, ModelError, PromptTooLong
from mlx_mcp.stats import EngineStats

DEFAULT_MAX_TOKENS = 512
KEEPALIVE_S = 5.0  # hosts cut a call that shows no life; repeat the latest progress this often
CHECK_S = 1.0  # how often a waiter looks whether the engine lives
MAX_LOGIT_BIASES = 1024

# What an argument may be.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda value: value is None or value >= 1, "at least 1"),
    "temperature": (lambda value: 0 <= value <= 5, "from 0 (greedy) to 5"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (lambda value: value >= 0, "0 (all tokens) or more"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda value: 0.01 <= value <= 10, "from 0.01 to 10; 1 means none"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "from -2 to 2"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "from -2 to 2"),
    "logprobs": (lambda value: value is None or 0 <= value <= 20, "from 0 to 20"),
}


@dataclass(frozen=True)
class GenerateRequest:
    """One completion.

    `max_tokens` None means 512, or what the context leaves; `seed` None draws one. `stop` strings end the answer, and
    only in the answer are they looked for: not in reasoning, not in tool calls. `tools` are function definitions in
    OpenAI's form; `reasoning` False asks the model for none. A `grammar` holds all of the text, which then has neither
    reasoning nor tool calls. Sampling is described in `SamplingParams`.
    """

    messages: tuple[Message, ...]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    logprobs: int | None = None
    session: str = ""  # calls of one session share a turn when there is not room for all
    grammar: Grammar | None = None
    tools: tuple[dict[str, Any], ...] = ()
    reasoning: bool = True


@dataclass(frozen=True)
class Progress:
    """Where the call is: `phase` is loading, queued, prefill or decode; `done` of `total` tokens once it is known."""

    phase: str
    message: str
    done: int = 0
    total: int | None = None


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
class Result:
    """The whole answer and what it took.

    `text` is the answer without `reasoning` and `tool_calls`; `logprobs`, if asked for, are of every token of these.
    """

    text: str
    finish_reason: FinishReason
    model: str
    prompt_tokens: int
    completion_tokens: int
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenChoice, ...] = ()


Update = Progress | Delta | Result


class Mailbox:
    """Events for one waiter on one event loop; `put` is the sink that the engine thread calls."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> bool:
        """Hand over an event, from any thread; False when the loop is gone."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop was closed
            return False
        return True

    async def get(self, timeout_s: float = math.inf) -> Event | None:
        """The next event; None after `timeout_s` without one.

        Raises:
            MlxMcpError: the event was a failure.
            EngineDead: the thread died without a word.
        """
        deadline = self._loop.time() + timeout_s
        while True:
            wait_s = min(CHECK_S, deadline - self._loop.time())
            try:
                async with asyncio.timeout(wait_s):
                    event = await self._queue.get()
            except TimeoutError:
                check_alive(self._thread)
                if wait_s < CHECK_S:
                    return None
                continue
            if isinstance(event, Failed):
                raise event.error
            return event


@dataclass
class Preparation:
    """Files being fetched for everyone who asked for the model."""

    future: Future[PreparedModel] = field(default_factory=Future)
    line: str = "preparing"

    def report(self, line: str) -> None:
        """Take a line on what is going on; called on the fetching thread, read on the event loops."""
        self.line = line


class Answer:
    """What has come of one sequence so far."""

    def __init__(self, model: LoadedModel, prompt: Prompt, request: GenerateRequest) -> None:
        self._model, self._prompt = model, prompt
        self._reader = model.tokenizer.reader(prompt, request.tools, plain=request.grammar is not None)
        self._stop = StopStrings(request.stop)
        self._deltas: list[Delta] = []
        self._choices: list[TokenChoice] = []
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stop.met

    def add(self, token: Token) -> list[Delta]:
        """Take the next token; returns what it lets be shown."""
        self.num_tokens += 1
        if token.logprobs is not None:
            read = self._model.tokenizer.token_text
            top = tuple((token_id, read(token_id), logprob) for token_id, logprob in token.logprobs.top)
            self._choices.append(TokenChoice(token.token_id, read(token.token_id), token.logprobs.logprob, top))
        return self._show(self._reader.add(token.token_id))

    def finish(self) -> list[Delta]:
        """Take the end of the sequence; returns what was held back."""
        shown = self._show(self._reader.finish())
        held = Delta(self._stop.finish(), self.num_tokens)
        self._deltas.append(held)
        return [*shown, held] if held.text else shown

    def result(self, reason: FinishReason | None) -> Result:
        """All of it; `reason` is why the sequence ended, None if it was a stop string that ended the answer."""
        calls = self._reader.tool_calls
        if self.stopped or reason is None:
            reason = FinishReason.STOP
        elif reason is FinishReason.STOP and calls:
            reason = FinishReason.TOOL_CALLS
        return Result(
            text=self._text(TextKind.ANSWER),
            finish_reason=reason,
            model=self._model.name,
            prompt_tokens=len(self._prompt.ids),
            completion_tokens=self.num_tokens,
            reasoning=self._text(TextKind.REASONING),
            tool_calls=calls,
            logprobs=tuple(self._choices),
        )

    def _show(self, pieces: list[Piece]) -> list[Delta]:
        deltas = []
        for piece in pieces:
            text = self._stop.feed(piece.text) if piece.kind is TextKind.ANSWER else piece.text
            if text:
                deltas.append(Delta(text, self.num_tokens, piece.kind))
        self._deltas += deltas
        return deltas

    def _text(self, kind: TextKind) -> str:
        return "".join(delta.text for delta in self._deltas if delta.kind is kind)


class EngineClient:
    """Generates on one engine thread; any number of callers, connections and event loops may share it."""

    def __init__(self, thread: EngineThread, registry: ModelRegistry, loader: ModelLoader) -> None:
        self.thread, self.registry, self.loader = thread, registry, loader
        self._ids = itertools.count(1)
        self._preparations: dict[str, Preparation] = {}
        self._lock = threading.Lock()

    @property
    def stats(self) -> EngineStats:
        """The engine's counts at its latest step boundary."""
        return self.thread.stats

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
        """Yield progress and text, and last the Result.

        Closing the generator (a cancelled task does) frees the row before the engine's next step.

        Raises:
            RequestError: the request cannot be carried out as it stands.
            CapacityError: the queue is full, or other models take the memory.
            ModelError: the model cannot be loaded.
            GenerationFailed: the engine had to drop this row.
            EngineDead: the engine thread has ended.
        """
        check(request)
        spec = await asyncio.to_thread(self.registry.resolve, request.model)
        while True:
            model: LoadedModel | None = None
            async for step in self._load(spec):
                if isinstance(step, Progress):
                    yield step
                else:
                    model = step
            assert model is not None, "loading ends with a model or an error"
            # On threads: templates and grammars may take long, and the loop serves everyone.
            tokenizer, grammar = model.tokenizer, request.grammar
            prompt = await asyncio.to_thread(
                tokenizer.encode_chat, list(request.messages), request.tools, request.reasoning and grammar is None
            )
            params = sampling_params(request, len(prompt.ids), model)
            constraint = None
            if grammar is not None:
                constraint = await asyncio.to_thread(tokenizer.compile, grammar, model.vocab_size)
            sequence_id, mailbox = next(self._ids), Mailbox(self.thread)
            submit = Submit(sequence_id, model.name, prompt.ids, params, mailbox.put, request.session, constraint)
            # `aclosing`: a bare `async for` would leave the row running until the garbage collector comes.
            async with aclosing(self._run(submit, mailbox, Answer(model, prompt, request))) as updates:
                async for update in updates:
                    yield update
                    if isinstance(update, Result):
                        return
            # The model was unloaded between loading and submitting: load it again.

    async def _run(self, submit: Submit, mailbox: Mailbox, answer: Answer) -> AsyncGenerator[Update, None]:
        """Submit and follow one sequence; ends without a Result if the model is not in memory."""
        num_prompt, ended = len(submit.prompt_ids), False
        total = num_prompt + submit.params.max_tokens
        progress = Progress("queued", "queued", 0, total)
        self.thread.send(submit)
        reason: FinishReason | None
        try:
            while not ended:
                deltas, reason = [], None
                match await mailbox.get(KEEPALIVE_S):
                    case Waiting(num_ahead):
                        progress = Progress("queued", f"queued behind {num_ahead} calls", 0, total)
                    case Prefilled(done):
                        progress = Progress(
                            "prefill", f"reading the prompt: {done} of {num_prompt} tokens", done, total
                        )
                    case Token() as token:
                        deltas = answer.add(token)
                        done = answer.num_tokens
                        progress = Progress("decode", f"{done} tokens", num_prompt + done, total)
                    case Finished(reason):
                        ended = True
                        deltas = answer.finish()
                    case Unloaded():
                        ended = True
                        return
                    case _:
                        pass  # nothing new for a while
                for delta in deltas:
                    yield delta
                if reason is not None or answer.stopped:
                    yield answer.result(reason)
                    return
                if not deltas:
                    yield progress
        finally:
            if not ended:
                with suppress(EngineDead):  # then no row is left to free
                    self.thread.send(Cancel(submit.sequence_id))

    async def _load(self, spec: ModelSpec) -> AsyncGenerator[Progress | LoadedModel, None]:
        """Yield progress and last the model, which is loaded if it is not in memory; one load serves all who ask."""
        mailbox = Mailbox(self.thread)
        self.thread.send(Find(spec.name, mailbox.put))
        event = await mailbox.get()
        if isinstance(event, Loaded):
            yield event.model
            return
        preparation = self._prepare(spec)
        future = asyncio.wrap_future(preparation.future)
        while True:
            done, _ = await asyncio.wait([future], timeout=CHECK_S)
            if done:
                break
            check_alive(self.thread)
            yield Progress("loading", f"loading {spec.name}: {preparation.line}")
        self.thread.send(Load(future.result(), mailbox.put))
        while True:
            match await mailbox.get(KEEPALIVE_S):
                case Loaded(model):
                    yield model
                    return
                case Loading(share):
                    yield Progress("loading", f"loading {spec.name}: {share:.0%} of the weights")
                case _:
                    pass

    def _prepare(self, spec: ModelSpec) -> Preparation:
        """Start fetching the model's files, or join whoever does."""
        with self._lock:
            running = self._preparations.get(spec.name)
            if running is not None:
                return running
            preparation = self._preparations[spec.name] = Preparation()
        # A daemon thread of its own: a download of minutes must not hold up the process's exit.
        fetch = threading.Thread(target=self._fetch, args=(spec, preparation), name=f"fetch {spec.name}", daemon=True)
        fetch.start()
        return preparation

    def _fetch(self, spec: ModelSpec, preparation: Preparation) -> None:
        """Prepare the model on this thread and tell whoever waits, whatever happens."""
        prepared, failure = None, None
        try:
            prepared = self.loader.prepare(spec, preparation.report)
        except MlxMcpError as error:
            failure = error
        except BaseException as error:  # even a library's SystemExit must not leave callers waiting
            failure = ModelError(f"Preparing {spec.name!r} failed: {error!r}.")
        with self._lock:
            del self._preparations[spec.name]
        if prepared is not None:
            preparation.future.set_result(prepared)
        else:
            preparation.future.set_exception(failure)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Fail every waiter and end the engine thread; returns whether it ended in time. Idempotent."""
        return self.thread.stop(timeout_s)


def check(request: GenerateRequest) -> None:
    """Refuse what cannot be carried out, before anything is loaded for it.

    Raises:
        InvalidRequest: with the argument's name and what it may be.
    """
    if not any(message.content.strip() for message in request.messages if message.role != "system"):
        raise InvalidRequest("The prompt is empty. Say in `prompt` what the model should do.")
    for name, (may_be, words) in RANGES.items():
        value = getattr(request, name)
        if not may_be(value):  # as nothing is that compares with NaN
            raise InvalidRequest(f"{name} is {value}; it must be {words}.")
    if any(not stop for stop in request.stop):
        raise InvalidRequest("A stop string is empty; leave it out.")
    biased = [token_id for token_id, _ in request.logit_bias]
    if len(biased) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"logit_bias has {len(biased)} entries; it may have {MAX_LOGIT_BIASES}.")
    if len(set(biased)) < len(biased):
        raise InvalidRequest("logit_bias names a token id twice; leave one out.")
    for token_id, bias in request.logit_bias:
        if token_id < 0 or not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias has {bias} for token id {token_id}; ids are 0 or more, biases from -100 to 100."
            )
    if request.tools and request.grammar is not None:
        raise InvalidRequest("`tools` and a grammar cannot go together: leave one out.")
    for tool in request.tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(
                'A tool has no function name; write {"type": "function", "function": {"name": …, "description": …, '
                '"parameters": …}}.'
            )


def sampling_params(request: GenerateRequest, num_prompt: int, model: LoadedModel) -> SamplingParams:
    """The request's sampling parameters, with max_tokens settled against the model's context.

    Raises:
        PromptTooLong: prompt and answer do not fit.
        InvalidRequest: logit_bias has an id that the model does not have.
    """
    room = model.context_tokens - num_prompt
    max_tokens = request.max_tokens or max(1, min(DEFAULT_MAX_TOKENS, room))
    if max_tokens > room:
        raise PromptTooLong(num_prompt, max_tokens, model.context_tokens)
    for token_id, _ in request.logit_bias:
        if token_id >= model.vocab_size:
            raise InvalidRequest(
                f"logit_bias has token id {token_id}; the ids of {model.name!r} go up to {model.vocab_size - 1}."
            )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        logprobs=request.logprobs,
        seed=random.getrandbits(32) if request.seed is None else request.seed,
    )


def check_alive(thread: EngineThread) -> None:
    """See that the engine can still answer.

    Raises:
        EngineDead: it cannot.
    """
    if thread.dead is not None:
        raise EngineDead(thread.dead.cause)
