"""The engine as an event loop sees it: one async call per generation.

Owns what lies between text and tokens: loading on first use, the chat template, grammars, streaming text, stop strings,
and cancelling the row when the caller goes away. Knows nothing of MCP or MLX.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from mlx_mcp.core.ports import (
    LoadedModel,
    ModelLoader,
    ModelRegistry,
    ModelSpec,
    PreparedModel,
)
from mlx_mcp.core.sequence import FinishReason
from mlx_mcp.engine.answer import Answer
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
from mlx_mcp.engine.requests import GenerateRequest, Progress, Result, Update, check, sampling_params
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import EngineDead, MlxMcpError, ModelError
from mlx_mcp.stats import EngineStats

KEEPALIVE_S = 5.0  # hosts cut a call that shows no life; repeat the latest progress this often
T = TypeVar("T")
CHECK_S = 1.0  # how often a waiter looks whether the engine lives


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


class EngineClient:
    """Generates on one engine thread; any number of callers, connections and event loops may share it."""

    def __init__(self, thread: EngineThread, registry: ModelRegistry, loader: ModelLoader) -> None:
        self.thread, self.registry, self.loader = thread, registry, loader
        self._ids = itertools.count(1)
        # Models that are in memory as far as known: asking the engine would cost every call a step. Weak, so that an
        # unloaded one goes.
        self._loaded: WeakValueDictionary[str, LoadedModel] = WeakValueDictionary()
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
            model = self._loaded.get(spec.name)
            if model is None:
                async for step in self._load(spec):
                    if isinstance(step, Progress):
                        yield step
                    else:
                        model = self._loaded[spec.name] = step
            assert model is not None, "loading ends with a model or an error"
            # On threads: templates and grammars may take long, and the loop serves everyone.
            tokenizer, grammar = model.tokenizer, request.grammar
            prompt = await asyncio.to_thread(
                tokenizer.encode_chat, list(request.messages), request.tools, request.reasoning and grammar is None
            )
            params = sampling_params(request, len(prompt.ids), model)
            constraint = None
            if grammar is not None:
                compiling = asyncio.wrap_future(apart(tokenizer.compile, grammar, model.vocab_size))
                while not (await asyncio.wait([compiling], timeout=CHECK_S))[0]:
                    yield Progress("queued", "compiling the grammar")
                constraint = compiling.result()
            sequence_id, mailbox = next(self._ids), Mailbox(self.thread)
            submit = Submit(sequence_id, model.name, prompt.ids, params, mailbox.put, request.session, constraint)
            # `aclosing`: a bare `async for` would leave the row running until the garbage collector comes.
            async with aclosing(self._run(submit, mailbox, Answer(model, prompt, request))) as updates:
                async for update in updates:
                    yield update
                    if isinstance(update, Result):
                        return
            # The model was unloaded before it was submitted to: load it again.
            self._loaded.pop(spec.name, None)

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


def apart(function: Callable[..., T], *args: Any) -> Future[T]:
    """Run it on a daemon thread of its own: threads of a pool hold up each other, and the process's exit."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever waits may be cancelled, this cannot

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # it is for whoever waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def check_alive(thread: EngineThread) -> None:
    """See that the engine can still answer.

    Raises:
        EngineDead: it cannot.
    """
    if thread.dead is not None:
        raise EngineDead(thread.dead.cause)
