"""Models as an event loop asks for them: files fetched and checked once for everyone who waits, then weights read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from mlx_mcp.core.ports import LoadedModel, LoadProgress, ModelLoader, ModelSpec, PreparedModel
from mlx_mcp.engine.awaited import CallState
from mlx_mcp.engine.mailbox import Mailbox, check_alive, repeated
from mlx_mcp.engine.messages import Cancel, Find, Load, Loaded, Loading, Waiting
from mlx_mcp.engine.requests import Progress
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import Abandoned, EngineDead, MlxMcpError, ModelError

LOADING_S = 0.25  # how often a load's progress is told

# While a call waits for these, others may be ahead of it.
IN_A_QUEUE = (
    CallState.AWAITS_ROOM,
    CallState.AWAITS_TURN,
    CallState.AWAITS_PREFIX,
    CallState.AWAITS_BLOCKS,
    CallState.AWAITS_MEMORY,
)


@dataclass
class Preparation:
    """Files being fetched for everyone who asked for the model, as long as one of them waits."""

    future: Future[PreparedModel] = field(default_factory=Future)
    progress: LoadProgress = field(default_factory=lambda: LoadProgress("preparing"))
    num_waiting: int = 0  # changed under the lock of Preparations

    def report(self, progress: LoadProgress) -> None:
        """Take the progress; called on the fetching thread, read on the event loops.

        Raises:
            Abandoned: nobody waits any more.
        """
        self.progress = progress
        if not self.num_waiting:
            raise Abandoned


class Preparations:
    """The models whose files are being fetched, by name; any thread and event loop may ask."""

    def __init__(self, loader: ModelLoader) -> None:
        self._loader = loader
        self._by_name: dict[str, Preparation] = {}
        self._lock = threading.Lock()

    async def prepare(self, spec: ModelSpec) -> AsyncGenerator[LoadProgress | PreparedModel, None]:
        """Yield progress and last the prepared model; closing the generator ends the waiting.

        Raises:
            ModelError: the files are missing, broken or not supported.
        """
        preparation = self._begin(spec)
        future = asyncio.wrap_future(preparation.future)
        try:
            while not (await asyncio.wait([future], timeout=LOADING_S))[0]:
                yield preparation.progress
        finally:
            future.cancel()  # only the waiting; the files are fetched as long as others wait
            with self._lock:
                preparation.num_waiting -= 1
        yield future.result()

    def _begin(self, spec: ModelSpec) -> Preparation:
        """Start fetching the model's files, or join whoever does; the caller counts as waiting from now on."""
        with self._lock:
            preparation = self._by_name.get(spec.name)
            if preparation is not None:
                preparation.num_waiting += 1
                return preparation
            preparation = self._by_name[spec.name] = Preparation(num_waiting=1)
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
                prepared = self._loader.prepare(spec, preparation.report)
            except MlxMcpError as error:
                failure = error
            except BaseException as error:  # even a library's SystemExit must not leave callers waiting
                failure = ModelError(
                    f"Preparing {spec.name!r} failed: {error!r}. Call again, or choose another model "
                    "(list_models shows them)."
                )
            with self._lock:
                if isinstance(failure, Abandoned) and preparation.num_waiting:
                    continue  # somebody came just then
                del self._by_name[spec.name]
            break
        if prepared is not None:
            preparation.future.set_result(prepared)
        else:
            preparation.future.set_exception(failure)


class Hold:
    """A model that stays in memory while a prompt is encoded for it, from when it was loaded or found there."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread, self.call_id = thread, 0  # 0: none

    def renew(self) -> int:
        """Take an id for the next call that is to hold the model; nothing came of the one before."""
        self.call_id = next(self._thread.ids)
        return self.call_id

    def hand_over(self) -> int:
        """The id, for a `Submit` which ends this."""
        call_id, self.call_id = self.call_id, 0
        return call_id

    def __enter__(self) -> Hold:
        """Nothing is held yet."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Let the model go, unless it was handed over."""
        if self.call_id:
            with suppress(EngineDead):  # then nothing is held
                self._thread.send(Cancel(self.call_id))


class Models:
    """The models of one engine thread, for any number of callers on any event loops."""

    def __init__(self, thread: EngineThread, loader: ModelLoader) -> None:
        self._thread = thread
        self.preparations = Preparations(loader)
        # Models that are in memory as far as known: asking the engine would cost every call a step. Weak, so that an
        # unloaded one goes.
        self.loaded: WeakValueDictionary[str, LoadedModel] = WeakValueDictionary()

    async def get(
        self, spec: ModelSpec, hold: Hold, asked_for: bool = False
    ) -> AsyncGenerator[Progress | LoadedModel, None]:
        """Yield progress and last the model, which is loaded if it is not in memory; one load serves all who ask.

        It waits for its turn where other models have the room. `asked_for` says that a user wants it loaded.

        Raises:
            CapacityError: other models have had the room for too long.
            ModelError: it cannot be loaded.
            EngineDead: the engine thread has ended.
        """
        model = None if asked_for else self.loaded.get(spec.name)
        if model is None:  # else it may be gone just now: then the call hears so, and comes again
            async with aclosing(self._load(spec, hold, asked_for)) as steps:
                async for step in steps:
                    if isinstance(step, LoadedModel):
                        model = step
                    else:
                        yield step
        assert model is not None, "loading ends with a model or an error"
        self.loaded[spec.name] = model
        yield model

    def forget(self, spec: ModelSpec) -> None:
        """Ask the engine next time: the model is not in memory any more."""
        self.loaded.pop(spec.name, None)

    async def _load(self, spec: ModelSpec, hold: Hold, asked_for: bool) -> AsyncGenerator[Progress | LoadedModel, None]:
        if not asked_for:
            with Mailbox(self._thread, hold.renew()) as answers:
                self._thread.send(Find(hold.call_id, spec.name, hold=True))
                event = await answers.get()
            if isinstance(event, Loaded):
                yield event.model
                return
        prepared: PreparedModel | None = None
        async with aclosing(self.preparations.prepare(spec)) as steps:
            async for step in steps:
                if isinstance(step, PreparedModel):
                    prepared = step
                else:
                    check_alive(self._thread)
                    yield loading(spec, step)
        assert prepared is not None, "preparing ends with a model or an error"
        told = Progress("loading", f"loading {spec.name}")
        # Another id than the Find had: the engine's thread may still be about to forget who listens to that.
        with Mailbox(self._thread, hold.renew()) as answers:
            self._thread.send(Load(hold.call_id, prepared, hold=True, asked_for=asked_for))
            while True:
                match await answers.next():
                    case Loaded(model):
                        yield model
                        return
                    case Loading(progress):
                        told = loading(spec, progress)
                    case Waiting() as waiting:
                        told = Progress("queued", queued(waiting), unit="bytes")
                    case _:  # nothing new for a while
                        told = repeated(self._thread, told)
                yield told


def queued(waiting: Waiting) -> str:
    """What a call that waits is said to wait for."""
    line, awaits = f"queued behind {waiting.num_ahead} calls", waiting.awaits
    if awaits is None:
        return line
    return f"{line if awaits.state in IN_A_QUEUE else 'queued'}: waits {awaits.words}"


def loading(spec: ModelSpec, progress: LoadProgress) -> Progress:
    """The progress of a load as a call shows it."""
    message, done, total = f"loading {spec.name}: {progress.doing}", progress.done_bytes, progress.total_bytes
    if total is None:
        return Progress("loading", message, unit="bytes")
    digits = 0 if total >= 10_000_000 else 1
    return Progress(
        "loading", f"{message} {done / 1e6:.{digits}f} of {total / 1e6:.{digits}f} MB", done, total, "bytes"
    )
