"""The engine as an event loop sees it: one async call per generation.

Owns what lies between text and tokens: loading on first use, the chat template, grammars, streaming text, stop strings,
and cancelling the row when the caller goes away. Knows nothing of MCP or MLX.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from mlx_mcp.chat.prompt import Prompt
from mlx_mcp.core.ports import (
    ChatTokenizer,
    LoadedModel,
    LoadProgress,
    ModelLoader,
    ModelRegistry,
    ModelSpec,
    PreparedModel,
)
from mlx_mcp.core.sequence import FinishReason
from mlx_mcp.core.session import SessionInfo
from mlx_mcp.engine.answer import Answer
from mlx_mcp.engine.messages import (
    Cancel,
    Close,
    Command,
    Event,
    Export,
    Failed,
    Find,
    Finish,
    Finished,
    Fork,
    Heads,
    Import,
    ListSessions,
    Load,
    Loaded,
    Loading,
    Moved,
    OnDisk,
    Persist,
    Persisted,
    Prefilled,
    Purge,
    Read,
    Remove,
    Sessions,
    Sink,
    Submit,
    Token,
    Told,
    Turn,
    Unloaded,
    Waiting,
)
from mlx_mcp.engine.requests import GenerateRequest, Progress, Result, Update, check, sampling_params
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import Abandoned, EngineDead, MlxMcpError, ModelError, UnknownSession
from mlx_mcp.stats import EngineStats

KEEPALIVE_S = 5.0  # hosts cut a call that shows no life; repeat the latest progress this often
T = TypeVar("T")
SLOW = "; the engine's current step has taken "
CHECK_S = 1.0  # how often a waiter looks whether the engine lives
LOADING_S = 0.25  # how often a load's progress is told


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
    """Files being fetched for everyone who asked for the model, as long as one of them waits."""

    future: Future[PreparedModel] = field(default_factory=Future)
    progress: LoadProgress = field(default_factory=lambda: LoadProgress("preparing"))
    num_waiting: int = 0  # changed under the client's lock

    def report(self, progress: LoadProgress) -> None:
        """Take the progress; called on the fetching thread, read on the event loops.

        Raises:
            Abandoned: nobody waits any more.
        """
        self.progress = progress
        if not self.num_waiting:
            raise Abandoned


class EngineClient:
    """Generates on one engine thread; any number of callers, connections and event loops may share it."""

    def __init__(self, thread: EngineThread, registry: ModelRegistry, loader: ModelLoader) -> None:
        self.thread, self.registry, self.loader = thread, registry, loader
        self.group = ""
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

    def beside(self, registry: ModelRegistry, group: str) -> EngineClient:
        """A client of the same engine for another group of callers, with models by other names; they know all alike."""
        other = copy(self)
        other.registry, other.group = registry, group
        return other

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
        while True:
            # Looked up again each time round: another turn may have gone on with it.
            session = await self.session(request.tenant, request.session) if request.session else None
            name = request.model if session is None else request.model or session.model
            spec = self.registry.at_hand(name)
            if spec is None:
                spec = await asyncio.to_thread(self.registry.resolve, name)
            model = self._loaded.get(spec.name)
            if model is None:
                async for step in self._load(spec):
                    if isinstance(step, Progress):
                        yield step
                    else:
                        model = self._loaded[spec.name] = step
            assert model is not None, "loading ends with a model or an error"
            # On threads: templates and grammars may take long, and the loop serves everyone.
            async with apart(encode, model.tokenizer, request, session) as encoding:
                while not (await asyncio.wait([encoding], timeout=CHECK_S))[0]:
                    yield Progress("queued", "encoding the prompt")
                prompt = encoding.result()
            num_before = 0 if session is None else session.num_tokens
            params = sampling_params(request, num_before + len(prompt.ids), model)
            constraint = None
            if request.grammar is not None:
                async with apart(model.tokenizer.compile, request.grammar, model.vocab_size) as compiling:
                    while not (await asyncio.wait([compiling], timeout=CHECK_S))[0]:
                        yield Progress("queued", "compiling the grammar")
                    constraint = compiling.result()
            sequence_id, mailbox = next(self._ids), Mailbox(self.thread)
            submit = Submit(
                sequence_id,
                model.name,
                prompt.ids,
                params,
                mailbox.put,
                request.lane,
                constraint,
                turn_of(request, session),
                self.group,
            )
            tools = request.tools if session is None else session.tools
            answer = Answer(model, prompt, num_before, request, tools)
            # `aclosing`: a bare `async for` would leave the row running until the garbage collector comes.
            async with aclosing(self._run(submit, mailbox, answer)) as updates:
                async for update in updates:
                    yield update
                    if isinstance(update, Result):
                        return
            # The model was unloaded before it was submitted to, or the session went on: from the beginning.
            self._loaded.pop(spec.name, None)

    async def session(self, tenant: str, session: str) -> SessionInfo:
        """The session of that handle or name, as of the engine's latest step.

        Raises:
            UnknownSession: the tenant has none, or has it no more.
            EngineDead: the engine thread has ended.
        """
        found = find(self.thread.sessions, tenant, session)
        if found is None:  # those on disk are known once the engine has begun
            found = find({info.session_id: info for info in await self.sessions(tenant)}, tenant, session)
        if found is None:
            raise UnknownSession(session)
        return found

    async def fork(
        self, tenant: str, session: str, count: int = 1, names: tuple[str, ...] = (), version: str = ""
    ) -> list[SessionInfo]:
        """`count` new sessions that go on from where the session's latest finished turn ended; copies nothing.

        With a `version` they go on from where the session was when that was persisted.

        Raises:
            RequestError: there is no such session or version, or it cannot be forked now, or not so.
            CapacityError: there are as many sessions as there may be.
            StorageError: the version cannot be read.
            EngineDead: the engine thread has ended.
        """
        return await self._about(lambda sink: Fork(tenant, session, count, names, sink, version))

    async def persist(self, tenant: str, session: str, version: str = "") -> Persisted:
        """Make a session durable as its latest finished turn left it, or a version of it under a name.

        Returns once it would survive a power cut. Goes on if the caller is cancelled.

        Raises:
            RequestError: there is no such session, or nothing of it can be kept.
            StorageError: it cannot be written now, or nothing is kept on disk here.
            EngineDead: the engine thread has ended.
        """
        mailbox = Mailbox(self.thread)
        self.thread.send(Persist(tenant, session, version, mailbox.put))
        event = await mailbox.get()
        assert isinstance(event, Persisted), f"{event} in answer to a session that was to be persisted"
        return event

    async def close_sessions(self, tenant: str, sessions: tuple[str, ...] = ()) -> list[SessionInfo]:
        """End these sessions, or all of the tenant's that are not persisted; their turns fail.

        Raises:
            UnknownSession: one of them is not there; then none is closed.
            EngineDead: the engine thread has ended.
        """
        return await self._about(lambda sink: Close(tenant, sessions, sink))

    async def sessions(self, tenant: str) -> list[SessionInfo]:
        """The tenant's sessions.

        Raises:
            EngineDead: the engine thread has ended.
        """
        return await self._about(lambda sink: ListSessions(tenant, sink))

    async def on_disk(
        self, what: Heads | Read | Remove | Purge | Export | Import, waiting: Callable[[], Awaitable[None]]
    ) -> Any:
        """Look at, or change, what is on disk of sessions; what comes back is said at `what`.

        Awaits `waiting` about once a second until then. A transfer goes on if the caller is cancelled: have it stopped.

        Raises:
            NotKeptHere: nothing is kept on disk here.
            RequestError: there is no such session, or it cannot be done with it.
            StorageError: it cannot be read or written now.
            EngineDead: the engine thread has ended.
        """
        mailbox = Mailbox(self.thread)
        self.thread.send(OnDisk(what, mailbox.put))
        while (event := await mailbox.get(0.9 * CHECK_S)) is None:
            await waiting()
        assert isinstance(event, Told), f"{event} in answer to something about the disk"
        return event.value

    async def _about(self, command: Callable[[Sink], Command]) -> list[SessionInfo]:
        mailbox = Mailbox(self.thread)
        self.thread.send(command(mailbox.put))
        event = await mailbox.get()
        assert isinstance(event, Sessions), f"{event} in answer to a question about sessions"
        return list(event.infos)

    async def _run(self, submit: Submit, mailbox: Mailbox, answer: Answer) -> AsyncGenerator[Update, None]:
        """Submit and follow one sequence; ends without a Result if it has to be submitted otherwise."""
        num_prompt, ended = answer.num_prompt, False
        total = num_prompt + submit.params.max_tokens
        progress = Progress("queued", "queued", 0, total)
        kept = submit.turn.opens is not None or (submit.turn.keep and bool(submit.turn.session))
        session: SessionInfo | None = None
        self.thread.send(submit)
        reason: FinishReason | None
        try:
            while not ended:
                deltas, reason = [], None
                match await mailbox.get(KEEPALIVE_S):
                    case Waiting(num_ahead):
                        progress = Progress("queued", f"queued behind {num_ahead} calls", 0, total)
                    case Prefilled(done) as prefilled:
                        answer.prefilled(prefilled)
                        progress = Progress(
                            "prefill", f"reading the prompt: {done} of {num_prompt} tokens", done, total
                        )
                    case Token() as token if not answer.stopped:
                        deltas = answer.add(token)
                        done = answer.num_tokens
                        progress = Progress("decode", f"{done} tokens", num_prompt + done, total)
                        if answer.stopped and kept:
                            self.thread.send(Finish(submit.sequence_id, answer.num_tokens))
                    case Finished(reason, session):
                        ended = True
                        deltas = answer.finish()
                    case Unloaded() | Moved():
                        ended = True
                        return
                    case _:  # nothing new for a while
                        progress = self._slow(progress)
                for delta in deltas:
                    yield delta
                if reason is not None or (answer.stopped and not kept):
                    yield answer.result(reason, session)
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
        try:
            while not (await asyncio.wait([future], timeout=LOADING_S))[0]:
                check_alive(self.thread)
                yield loading(spec, preparation.progress)
        finally:
            future.cancel()  # only the waiting; the files are fetched as long as others wait
            with self._lock:
                preparation.num_waiting -= 1
        self.thread.send(Load(future.result(), mailbox.put))
        while True:
            match await mailbox.get(KEEPALIVE_S):
                case Loaded(model):
                    yield model
                    return
                case Loading(progress):
                    yield loading(spec, progress)
                case _:
                    yield self._slow(Progress("loading", f"loading {spec.name}"))

    def _slow(self, progress: Progress) -> Progress:
        """The same progress, with word of a step that takes long."""
        line = progress.message.partition(SLOW)[0]
        step_s = self.thread.step_s
        return replace(progress, message=f"{line}{SLOW}{step_s:.0f} s" if step_s > KEEPALIVE_S else line)

    def _prepare(self, spec: ModelSpec) -> Preparation:
        """Start fetching the model's files, or join whoever does; the caller counts as waiting from now on."""
        with self._lock:
            preparation = self._preparations.get(spec.name)
            if preparation is not None:
                preparation.num_waiting += 1
                return preparation
            preparation = self._preparations[spec.name] = Preparation(num_waiting=1)
            preparation.future.set_running_or_notify_cancel()  # whoever waits may be cancelled, this cannot
        # A daemon thread of its own: a download of minutes must not hold up the process's exit.
        fetch = threading.Thread(target=self._fetch, args=(spec, preparation), name=f"fetch {spec.name}", daemon=True)
        fetch.start()
        return preparation

    def _fetch(self, spec: ModelSpec, preparation: Preparation) -> None:
        """Prepare the model on this thread and tell whoever waits, whatever happens."""
        while True:
            prepared, failure = None, None
            try:
                prepared = self.loader.prepare(spec, preparation.report)
            except MlxMcpError as error:
                failure = error
            except BaseException as error:  # even a library's SystemExit must not leave callers waiting
                failure = ModelError(f"Preparing {spec.name!r} failed: {error!r}.")
            with self._lock:
                if isinstance(failure, Abandoned) and preparation.num_waiting:
                    continue  # somebody came just then
                del self._preparations[spec.name]
            break
        if prepared is not None:
            preparation.future.set_result(prepared)
        else:
            preparation.future.set_exception(failure)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Fail every waiter and end the engine thread; returns whether it ended in time. Idempotent."""
        return self.thread.stop(timeout_s)


def loading(spec: ModelSpec, progress: LoadProgress) -> Progress:
    """The progress of a load as a call shows it."""
    message, done, total = f"loading {spec.name}: {progress.doing}", progress.done_bytes, progress.total_bytes
    if total is None:
        return Progress("loading", message, unit="bytes")
    digits = 0 if total >= 10_000_000 else 1
    return Progress(
        "loading", f"{message} {done / 1e6:.{digits}f} of {total / 1e6:.{digits}f} MB", done, total, "bytes"
    )


def find(infos: dict[str, SessionInfo], tenant: str, session: str) -> SessionInfo | None:
    """A tenant's session of that handle or name."""
    found = infos.get(session)
    if found is None:
        found = next((info for info in list(infos.values()) if (info.tenant, info.name) == (tenant, session)), None)
    return None if found is None or found.tenant != tenant else found


def encode(
    tokenizer: ChatTokenizer, request: GenerateRequest, session: SessionInfo | None, gone: Callable[[], bool]
) -> Prompt:
    """What a request adds to its session's tokens, or the whole prompt of one without.

    Raises:
        InvalidRequest: the model's template cannot take it.
    """
    reasoning = request.reasoning and request.grammar is None
    if session is not None:
        return tokenizer.encode_turn(request.messages[-1].text, session.after, session.tools, reasoning, gone)
    if request.context:
        return Prompt(tokenizer.encode_context(list(request.messages), request.tools, gone))
    return tokenizer.encode_chat(list(request.messages), request.tools, reasoning, gone)


def turn_of(request: GenerateRequest, session: SessionInfo | None) -> Turn:
    """What the engine has to know of a request's session."""
    context = ""
    if request.context:
        context = "assistant" if request.messages[-1].role == "assistant" else "user"
    if session is None:
        return Turn(request.tenant, opens=request.opens, tools=request.tools, context=context)
    cut = request.sampling.max_tokens is None
    return Turn(request.tenant, session.session_id, session.after, request.keep, request.queue, cut)


@asynccontextmanager
async def apart(function: Callable[..., T], *args: Any) -> AsyncIterator[asyncio.Future[T]]:
    """Run it on a daemon thread of its own: threads of a pool hold up each other, and the process's exit.

    It gets one more argument, which tells it whether anybody still waits; nobody does after the block.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever waits may be cancelled, this cannot
    gone = threading.Event()

    def run() -> None:
        try:
            future.set_result(function(*args, gone.is_set))
        except BaseException as error:  # it is for whoever waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    waiting = asyncio.wrap_future(future)
    try:
        yield waiting
    finally:
        gone.set()
        waiting.cancel()


def check_alive(thread: EngineThread) -> None:
    """See that the engine can still answer.

    Raises:
        EngineDead: it cannot.
    """
    if thread.dead is not None:
        raise EngineDead(thread.dead.cause)
