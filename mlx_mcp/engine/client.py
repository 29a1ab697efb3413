"""The engine as an event loop sees it: one async call per generation.

Owns what lies between text and tokens: loading on first use, the chat template, streaming text, stop strings, and
cancelling the row when the caller goes away. Knows nothing of MCP or MLX.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from mlx_mcp.core.ports import LoadedModel, Message, ModelLoader, ModelRegistry, ModelSpec, PreparedModel
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


@dataclass(frozen=True)
class GenerateRequest:
    """One completion. `max_tokens` None means 512, or what the context leaves; `seed` None draws one."""

    messages: tuple[Message, ...]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Progress:
    """Where the call is: `phase` is loading, queued, prefill or decode; `done` of `total` tokens once it is known."""

    phase: str
    message: str
    done: int = 0
    total: int | None = None


@dataclass(frozen=True)
class Delta:
    """New text of the answer."""

    text: str
    num_tokens: int


@dataclass(frozen=True)
class Result:
    """The whole answer and what it took."""

    text: str
    finish_reason: FinishReason
    model: str
    prompt_tokens: int
    completion_tokens: int


Update = Progress | Delta | Result


class Mailbox:
    """Events for one waiter on one event loop; `put` is the sink that the engine thread calls."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> bool:
        """Hand over an event, from any thread; False when the loop is gone."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop was closed
            return False
        return True

    async def get(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None after `timeout_s` without one.

        Raises:
            MlxMcpError: the event was a failure.
        """
        try:
            event = await asyncio.wait_for(self._queue.get(), timeout_s)
        except TimeoutError:
            return None
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
            # On a thread: a template may take long, and the loop serves everyone.
            prompt_ids = tuple(await asyncio.to_thread(model.tokenizer.encode_chat, list(request.messages)))
            params = sampling_params(request, len(prompt_ids), model.context_tokens)
            # `aclosing`: a bare `async for` would leave the row running until the garbage collector comes.
            async with aclosing(self._run(model, prompt_ids, params, request.stop)) as updates:
                async for update in updates:
                    yield update
                    if isinstance(update, Result):
                        return
            # The model was unloaded between loading and submitting: load it again.

    async def _run(
        self, model: LoadedModel, prompt_ids: tuple[int, ...], params: SamplingParams, stops: tuple[str, ...]
    ) -> AsyncGenerator[Update, None]:
        """Submit and follow one sequence; ends without a Result if the model is not in memory."""
        mailbox, sequence_id = Mailbox(), next(self._ids)
        detokenizer, stop = model.tokenizer.detokenizer(), StopStrings(stops)
        num_prompt, num_tokens, text, ended = len(prompt_ids), 0, "", False
        total = num_prompt + params.max_tokens
        progress = Progress("queued", "queued", 0, total)
        self.thread.send(Submit(sequence_id, model.name, prompt_ids, params, mailbox.put))
        reason: FinishReason | None
        try:
            while not ended:
                piece, reason = "", None
                match await mailbox.get(KEEPALIVE_S):
                    case Waiting(num_ahead):
                        progress = Progress("queued", f"queued behind {num_ahead} calls", 0, total)
                    case Prefilled(done):
                        progress = Progress(
                            "prefill", f"reading the prompt: {done} of {num_prompt} tokens", done, total
                        )
                    case Token(token_id):
                        num_tokens += 1
                        piece = stop.feed(detokenizer.add(token_id))
                        progress = Progress("decode", f"{num_tokens} tokens", num_prompt + num_tokens, total)
                        reason = FinishReason.STOP if stop.met else None
                    case Finished(reason):
                        ended = True
                        piece = stop.feed(detokenizer.finish()) + stop.finish()
                        reason = FinishReason.STOP if stop.met else reason
                    case Unloaded():
                        ended = True
                        return
                    case _:
                        pass  # nothing new for a while
                if piece:
                    text += piece
                    yield Delta(piece, num_tokens)
                elif reason is None:
                    yield progress
                if reason is not None:
                    yield Result(text, reason, model.name, num_prompt, num_tokens)
                    return
        finally:
            if not ended:
                with suppress(EngineDead):  # then no row is left to free
                    self.thread.send(Cancel(sequence_id))

    async def _load(self, spec: ModelSpec) -> AsyncGenerator[Progress | LoadedModel, None]:
        """Yield progress and last the model, which is loaded if it is not in memory; one load serves all who ask."""
        mailbox = Mailbox()
        self.thread.send(Find(spec.name, mailbox.put))
        event = await mailbox.get()
        if isinstance(event, Loaded):
            yield event.model
            return
        preparation = self._prepare(spec)
        future = asyncio.wrap_future(preparation.future)
        while True:
            done, _ = await asyncio.wait([future], timeout=1.0)
            if done:
                break
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
    if request.max_tokens is not None and request.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {request.max_tokens}; it must be at least 1.")
    if not 0 <= request.temperature <= 5:
        raise InvalidRequest(f"temperature is {request.temperature:g}; it must be from 0 (greedy) to 5.")
    if not 0 < request.top_p <= 1:
        raise InvalidRequest(f"top_p is {request.top_p:g}; it must be above 0 and at most 1.")
    if any(not stop for stop in request.stop):
        raise InvalidRequest("A stop string is empty; leave it out.")


def sampling_params(request: GenerateRequest, num_prompt: int, context_tokens: int) -> SamplingParams:
    """The request's sampling parameters, with max_tokens settled against the context.

    Raises:
        PromptTooLong: prompt and answer do not fit.
    """
    room = context_tokens - num_prompt
    max_tokens = request.max_tokens or max(1, min(DEFAULT_MAX_TOKENS, room))
    if max_tokens > room:
        raise PromptTooLong(num_prompt, max_tokens, context_tokens)
    seed = random.getrandbits(32) if request.seed is None else request.seed
    return SamplingParams(max_tokens, request.temperature, request.top_p, seed)
