"""The engine as an event loop sees it: one async call per generation, and the commands about sessions.

Any number of callers, connections and event loops may share one. Knows nothing of MCP or MLX.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from copy import copy
from typing import Any

from mlx_mcp.core.origin import Origin
from mlx_mcp.core.ports import LoadedModel, ModelLoader, ModelRegistry
from mlx_mcp.core.session import SessionInfo
from mlx_mcp.engine.generation import EncodedRequest, Generation
from mlx_mcp.engine.loading import Hold, Models
from mlx_mcp.engine.mailbox import CHECK_S, Mailbox
from mlx_mcp.engine.messages import (
    AboutSessions,
    Close,
    Event,
    Export,
    Fork,
    Heads,
    Import,
    ListSessions,
    OnDisk,
    Persist,
    Persisted,
    Purge,
    Read,
    ReadTokens,
    Remove,
    Sessions,
    SessionTokens,
    Told,
    Unload,
    Unloaded,
)
from mlx_mcp.engine.requests import Count, GenerateRequest, Progress, Update, check
from mlx_mcp.engine.spellings import Spellings
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import UnknownSession
from mlx_mcp.stats import EngineStats


class EngineClient:
    """Generates on one engine thread; any number of callers, connections and event loops may share it."""

    def __init__(self, thread: EngineThread, registry: ModelRegistry, loader: ModelLoader) -> None:
        self.thread, self.registry, self.loader = thread, registry, loader
        self.group = ""
        self._models = Models(thread, loader)
        self._spellings = Spellings()

    @property
    def stats(self) -> EngineStats:
        """The engine's counts at its latest step boundary."""
        return self.thread.stats

    def for_connection(self, registry: ModelRegistry, group: str) -> EngineClient:
        """A client of the same engine for the callers of one connection, with models by that connection's names."""
        other = copy(self)
        other.registry, other.group = registry, group
        return other

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Update, None]:
        """Progress and text as they come, and last the Result.

        Closing the generator (a cancelled task does) frees the row before the engine's next step.

        Raises:
            RequestError: the request cannot be carried out as it stands.
            CapacityError: the queue is full, or other models take the memory.
            ModelError: the model cannot be loaded.
            GenerationFailed: the engine had to drop this row.
            EngineDead: the engine thread has ended.
        """
        check(request)
        return self._generation(request).run()

    async def load_model(self, name: str | None) -> AsyncGenerator[Progress | LoadedModel, None]:
        """Yield progress, and last the model of that name, in memory; it waits for its turn where others have the room.

        A load that has begun goes on if the generator is closed.

        Raises:
            UnknownModel: there is no such model.
            CapacityError: other models have had the room for too long.
            ModelError: it cannot be loaded.
            EngineDead: the engine thread has ended.
        """
        spec = await asyncio.to_thread(self.registry.resolve, name)
        with Hold(self.thread) as hold:
            async with aclosing(self._models.get(spec, hold, asked_for=True)) as steps:
                async for step in steps:
                    yield step

    async def unload_model(self, name: str | None) -> int:
        """Have a model's weights go from memory; returns their bytes, 0 if they were not there. Its sessions stay.

        Raises:
            UnknownModel: there is no such model.
            ModelBusy: calls use it, or it is being loaded.
            EngineDead: the engine thread has ended.
        """
        spec = await asyncio.to_thread(self.registry.resolve, name)
        event = await self._answer(Unload(next(self.thread.ids), spec.name))
        assert isinstance(event, Unloaded), f"{event} in answer to a model that was to be unloaded"
        self._models.forget(spec)
        return event.num_bytes

    async def count(self, request: GenerateRequest) -> AsyncGenerator[Progress | Count, None]:
        """Yield progress of a load, and last how many tokens the request's prompt has. Nothing is computed.

        Raises:
            RequestError: the request cannot be carried out as it stands.
            CapacityError: other models take the memory.
            ModelError: the model cannot be loaded.
            EngineDead: the engine thread has ended.
        """
        check(request)
        generation = self._generation(request)
        with Hold(self.thread) as hold:
            async with aclosing(generation.encode(hold)) as steps:
                async for step in steps:
                    if isinstance(step, EncodedRequest):
                        model = step.model
                        yield Count(step.num_prompt, model.context_tokens, model.name, step.prompt.notes)
                    else:
                        yield step

    async def session(self, tenant: str, session: str, fresh: bool = False) -> SessionInfo:
        """The session of that handle or name, as of the engine's latest step; `fresh` after all commands so far.

        Raises:
            UnknownSession: the tenant has none, or has it no more.
            EngineDead: the engine thread has ended.
        """
        found = None if fresh else find(self.thread.sessions, tenant, session)
        if found is None:  # those on disk are known once the engine has begun
            theirs = await self.sessions(tenant)
            found = find({info.session_id: info for info in theirs}, tenant, session)
            if found is None:
                raise UnknownSession(session, names=[info.name for info in theirs])
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
        return await self._ask(Fork(next(self.thread.ids), tenant, session, count, names, version))

    async def persist(self, tenant: str, session: str, version: str = "") -> Persisted:
        """Make a session durable as its latest finished turn left it, or a version of it under a name.

        Returns once it would survive a power cut. Goes on if the caller is cancelled.

        Raises:
            RequestError: there is no such session, or nothing of it can be kept.
            StorageError: it cannot be written now, or nothing is kept on disk here.
            EngineDead: the engine thread has ended.
        """
        event = await self._answer(Persist(next(self.thread.ids), tenant, session, version))
        assert isinstance(event, Persisted), f"{event} in answer to a session that was to be persisted"
        return event

    async def close_sessions(self, tenant: str, sessions: tuple[str, ...] = ()) -> list[SessionInfo]:
        """End these sessions, or all of the tenant's that are not persisted; their turns fail.

        Raises:
            UnknownSession: one of them is not there; then none is closed.
            EngineDead: the engine thread has ended.
        """
        return await self._ask(Close(next(self.thread.ids), tenant, sessions))

    async def sessions(self, tenant: str) -> list[SessionInfo]:
        """The tenant's sessions.

        Raises:
            EngineDead: the engine thread has ended.
        """
        return await self._ask(ListSessions(next(self.thread.ids), tenant))

    async def held_bytes(self, tenant: str) -> int:
        """The bytes of keys and values that the tenant's sessions hold in memory; what they share counts once.

        Raises:
            EngineDead: the engine thread has ended.
        """
        event = await self._answer(ListSessions(next(self.thread.ids), tenant, weigh=True))
        assert isinstance(event, Sessions), f"{event} in answer to a question about sessions"
        return event.held_bytes

    async def transcript(self, tenant: str, session: str) -> tuple[SessionInfo, str, tuple[Origin, ...]]:
        """A session, its text as JSON (see ChatTokenizer.transcript), and where its turns come from.

        No model is loaded for that, and a turn that is under way is not in it.

        Raises:
            UnknownSession: the tenant has none, or has it no more.
            StorageError: it is on disk and cannot be read.
            EngineDead: the engine thread has ended.
        """
        found = await self._answer(ReadTokens(next(self.thread.ids), tenant, session))
        assert isinstance(found, SessionTokens), f"{found} in answer to a question for a session's tokens"
        if found.tokenizer is None:
            return found.info, found.text, found.origins
        begins = tuple(origin.begin for origin in found.origins)
        return found.info, await asyncio.to_thread(found.tokenizer.transcript, found.tokens, begins), found.origins

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
        with Mailbox(self.thread, next(self.thread.ids)) as mailbox:
            self.thread.send(OnDisk(mailbox.call_id, what))
            while (event := await mailbox.get(0.9 * CHECK_S)) is None:
                await waiting()
        assert isinstance(event, Told), f"{event} in answer to something about the disk"
        return event.value

    def close(self, timeout_s: float = 5.0) -> bool:
        """Fail every waiter and end the engine thread; returns whether it ended in time. Idempotent."""
        return self.thread.stop(timeout_s)

    def _generation(self, request: GenerateRequest) -> Generation:
        return Generation(self.thread, self.registry, self._models, self._spellings, self.session, request, self.group)

    async def _ask(self, command: AboutSessions) -> list[SessionInfo]:
        event = await self._answer(command)
        assert isinstance(event, Sessions), f"{event} in answer to a question about sessions"
        return list(event.infos)

    async def _answer(self, command: AboutSessions | Unload) -> Event | None:
        with Mailbox(self.thread, command.call_id) as mailbox:
            self.thread.send(command)
            return await mailbox.get()


def find(infos: dict[str, SessionInfo], tenant: str, session: str) -> SessionInfo | None:
    """A tenant's session of that handle or name."""
    found = infos.get(session)
    if found is None:
        found = next((info for info in list(infos.values()) if (info.tenant, info.name) == (tenant, session)), None)
    return None if found is None or found.tenant != tenant else found
