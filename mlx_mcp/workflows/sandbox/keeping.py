"""Keeps sandboxes on disk: what is persisted because a caller asks for it, and what is saved because it has changed.

Guarantees:
    - A state of up to SMALL_BYTES is on disk before the run that left it is answered, unless the disk takes longer than
      PATIENCE_S. A longer one follows when `autosave_s` have passed since the one before it was saved.
    - What is on disk of a sandbox is always one whole state, with the journal that belongs to it.
    - `persist` has the sessions of remembered texts made durable first, and a version has forks of these for itself:
      whatever the sandbox forgets later, its version remembers.

The log of sandboxes is used on one thread, and opened at its first use. Everything else is for one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import anyio

from mlx_mcp.core.durable_sandbox import SandboxHead, SandboxLog, SandboxRecord, damaged
from mlx_mcp.errors import StorageError, UnknownSandbox, UnknownSession, UnknownVersion
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.service.sessions import persist_session, stored_bytes
from mlx_mcp.workflows.asking import close_sessions, fork_all
from mlx_mcp.workflows.sandbox.journal import Journal
from mlx_mcp.workflows.sandbox.sandbox import Kept, Sandbox, State

logger = logging.getLogger(__name__)

SMALL_BYTES = 16 << 20
PATIENCE_S = 2.0
T = TypeVar("T")


@dataclass(frozen=True)
class KeepingOptions:
    """How long what is on disk stays without use, and how often long states are saved."""

    autosave_s: float = 300.0
    ttl_s: float = 86_400.0  # of what nobody asked to keep
    persisted_ttl_s: float = 30 * 86_400.0


@dataclass(frozen=True)
class PersistedSandbox:
    """A sandbox that is durable now."""

    sandbox: Sandbox
    version: str
    stored_bytes: int
    num_remembered: int  # texts whose keys and values are durable too
    expires_in_s: float


class Keeping:
    """The sandboxes of a process on disk. Without `open_log` nothing is kept; `is_any` says whether anything may be."""

    def __init__(
        self,
        open_log: Callable[[], SandboxLog] | None = None,
        is_any: Callable[[], bool] = lambda: True,
        options: KeepingOptions = KeepingOptions(),
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.options = options
        self._open, self._is_any, self._wall = open_log, is_any, wall
        self._log: SandboxLog | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def heads(self) -> list[SandboxHead]:
        """Everything that is on disk; nothing where the log cannot be opened, which the server's log says."""
        if self._open is None or (self._log is None and not self._is_any()):
            return []
        try:
            return await self._do(lambda log: log.heads())
        except StorageError as error:
            logger.warning("no sandbox is kept on disk: %s", error)
            return []

    def was_damaged(self, owner: str, sandbox: str) -> bool:
        """Whether what was kept of a sandbox of that handle was found damaged."""
        return self._log is not None and self._log.is_damaged(owner, sandbox)

    async def read(self, sandbox: Sandbox) -> None:
        """Read the state of a sandbox that is on disk only; nothing is done if it is in memory.

        Raises:
            StorageError: it is damaged, or cannot be read.
        """
        if sandbox.kept.unread:
            state = await self._load(sandbox, "")
            if sandbox.kept.unread:  # another call may have read it meanwhile, and a run may have followed
                sandbox.state = sandbox.kept.state = state
                sandbox.kept.unread = False

    async def state_of(self, sandbox: Sandbox, version: str = "") -> State:
        """The state of a sandbox as its latest finished run left it, or as it is in a version.

        Raises:
            UnknownVersion: there is no such version.
            StorageError: it is damaged, or cannot be read.
        """
        if not version:
            await self.read(sandbox)
            return sandbox.state
        if version not in sandbox.kept.versions:
            raise UnknownVersion(sandbox.name or sandbox.sandbox_id, version, tuple(sorted(sandbox.kept.versions)))
        return await self._load(sandbox, version)

    async def journal_of(self, sandbox: Sandbox) -> Journal:
        """What was run in a sandbox. One that is on disk only stays there.

        Raises:
            StorageError: it is damaged, or cannot be read.
        """
        return (await self._load(sandbox, "")).journal if sandbox.kept.unread else sandbox.state.journal

    async def _load(self, sandbox: Sandbox, version: str) -> State:
        record = await self._do(lambda log: log.load(sandbox.sandbox_id, version))
        if record is None:
            raise damaged(sandbox.name or sandbox.sandbox_id)
        return state_from(record)

    async def persist(self, service: Service, caller: Caller, sandbox: Sandbox, version: str = "") -> PersistedSandbox:
        """Make a sandbox durable as its latest finished run left it, and a version of it if one is named.

        Goes on if the caller is cancelled.

        Raises:
            UnknownSandbox: it was closed meanwhile.
            RateLimited: its owner may have no more on disk.
            StorageError: it cannot be written now, or nothing is kept on disk here.
        """
        return await self._shielded(self._persist(service, caller, sandbox, version))

    async def _persist(self, service: Service, caller: Caller, sandbox: Sandbox, version: str) -> PersistedSandbox:
        await self.read(sandbox)
        state = sandbox.state
        await self._check_disk(service, caller, state.nbytes)
        num = await persist_sessions(service, caller, set(state.remembered.values()))
        was, sandbox.kept.persisted = sandbox.kept.persisted, True
        try:
            await self._save(sandbox, state)
        except BaseException:
            sandbox.kept.persisted = was
            raise
        if version:
            await self._save_version(service, caller, sandbox, state, version)
        await self._autosave(sandbox)  # a run may have ended and been saved while the sessions were written
        heads = [head for head in await self.heads() if head.sandbox_id == sandbox.sandbox_id]
        size = sum(head.stored_bytes for head in heads if head.version == version)
        return PersistedSandbox(sandbox, version, size, num, self.options.persisted_ttl_s)

    async def _save_version(
        self, service: Service, caller: Caller, sandbox: Sandbox, state: State, version: str
    ) -> None:
        """Make a version durable, which remembers by sessions of its own."""
        own: dict[str, str] = {}
        before = {session for head in await self._versions_of(sandbox, version) for session in head.remembered.values()}
        try:
            for key, session in state.remembered.items():
                [own[key]] = await fork_all(service, caller, session, 1)
            await persist_sessions(service, caller, set(own.values()))
            await self._save(sandbox, replace(state, remembered=own), version)
        except BaseException:
            await close_sessions(service, caller.tenant, set(own.values()) - set(state.remembered.values()))
            raise
        sandbox.kept.versions |= {version}
        await close_sessions(service, caller.tenant, before)

    async def ran(self, sandbox: Sandbox) -> None:
        """See that the state of a sandbox, in which a run has ended, gets to the disk in time."""
        if self._open is None or sandbox.closed or sandbox.state is sandbox.kept.state or sandbox.kept.temporary:
            return
        if sandbox.state.nbytes <= SMALL_BYTES:
            with anyio.move_on_after(PATIENCE_S):
                await self._shielded(self._autosave(sandbox))
        elif sandbox.kept.saving is None:
            sandbox.kept.saving = self._begin(self._autosave_later(sandbox))

    async def _autosave_later(self, sandbox: Sandbox) -> None:
        try:
            await asyncio.sleep(sandbox.kept.saved_at + self.options.autosave_s - self._now())
            saved = await self._autosave(sandbox)
        finally:
            sandbox.kept.saving = None
        if saved:
            await self.ran(sandbox)  # for a run that ended meanwhile

    async def _autosave(self, sandbox: Sandbox) -> bool:
        """Save a sandbox if it has changed since it was saved; returns whether that could be done.

        A failure is for the log: the state is in memory, and the next run tries again.
        """
        changed = sandbox.state is not sandbox.kept.state and not sandbox.kept.unread
        if changed and sandbox.state.dump and not (sandbox.closed or sandbox.kept.temporary):
            try:
                await self._save(sandbox, sandbox.state)
            except StorageError as error:
                sandbox.kept.saved_at = self._now()
                logger.warning("a sandbox could not be saved: %s", error)
                return False
        return True

    async def remove(self, service: Service, sandbox: Sandbox) -> None:
        """Remove what is on disk of a closed sandbox, with the sessions that its versions remember by.

        A disk that fails leaves it there until its time is over, which the log says.
        """
        assert sandbox.closed, "a sandbox that goes on would be saved again"
        if sandbox.kept.saving is not None:
            sandbox.kept.saving.cancel()
        with anyio.CancelScope(shield=True):
            if self._open is not None:
                try:
                    await self._remove(service, sandbox, None)
                except StorageError as error:
                    logger.warning("a sandbox could not be removed: %s", error)

    async def remove_version(self, service: Service, sandbox: Sandbox, version: str) -> None:
        """Remove one version of a sandbox, with the sessions that it remembers by.

        Raises:
            StorageError: it is still there, or may be after a power cut.
        """
        await self._remove(service, sandbox, version)
        sandbox.kept.versions -= {version}

    async def _remove(self, service: Service, sandbox: Sandbox, version: str | None) -> None:
        heads = await self._versions_of(sandbox, version)
        await self._do(lambda log: log.remove(sandbox.sandbox_id, version))
        await close_sessions(service, sandbox.owner, {each for head in heads for each in head.remembered.values()})

    async def clear(self) -> None:
        """Remove everything from disk, once all sandboxes are closed; nothing is done where nothing was ever kept.

        Raises:
            StorageError: some of it is still there.
        """
        if self._open is not None and (self._log is not None or self._is_any()):
            await self._do(lambda log: log.clear())

    async def close(self, sandboxes: list[Sandbox]) -> None:
        """Save those of the sandboxes that have changed, and let go of the log. The process is about to end."""
        for task in list(self._tasks):
            task.cancel()
        if self._open is not None:
            for sandbox in sandboxes:
                await self._autosave(sandbox)
        log, thread = self._log, self._thread
        self._open = self._log = self._thread = None
        if thread is not None:
            if log is not None:
                await asyncio.get_running_loop().run_in_executor(thread, log.close)
            thread.shutdown(wait=False)

    # Beneath

    async def _save(self, sandbox: Sandbox, state: State, version: str = "") -> None:
        if sandbox.closed:
            raise UnknownSandbox(sandbox.name or sandbox.sandbox_id)
        record = record_of(sandbox, state, version, self.options, self._wall())
        await self._do(lambda log: log.save(record))
        if not version:
            sandbox.kept.state, sandbox.kept.saved_at = state, self._now()

    async def _versions_of(self, sandbox: Sandbox, version: str | None = None) -> list[SandboxHead]:
        heads = await self._do(lambda log: log.heads())
        return [head for head in heads if head.sandbox_id == sandbox.sandbox_id and version in (None, head.version)]

    async def _check_disk(self, service: Service, caller: Caller, more_bytes: int) -> None:
        if service.limits.weighs_disk(caller.tenant):
            sessions = [info for info in known_sessions(service).values() if info.tenant == caller.tenant]
            stored = sum(stored_bytes(service, info) for info in sessions)
            stored += sum(head.stored_bytes for head in await self.heads() if head.tenant == caller.tenant)
            service.limits.check_disk(caller.tenant, stored, more_bytes)

    async def _do(self, work: Callable[[SandboxLog], T]) -> T:
        """Do something with the log, on its thread. It is done also if the caller is cancelled.

        Raises:
            StorageError: it failed, or nothing is kept here.
        """
        if self._open is None:
            raise StorageError(
                "No sandbox is kept on disk. Have the server started with max_ssd_bytes above 0, and "
                "max_sandbox_disk_bytes too."
            )
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "mlx-sandboxes")

        def on_thread() -> T:
            if self._log is None:
                assert self._open is not None
                self._log = self._open()
                with suppress(StorageError):  # the next start tries again
                    self._log.expire(self._wall())
            return work(self._log)

        return await asyncio.get_running_loop().run_in_executor(self._thread, on_thread)

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _shielded(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on a task of its own, which goes on if the caller is cancelled."""
        return await asyncio.shield(self._begin(work))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


async def persist_sessions(service: Service, caller: Caller, sessions: set[str]) -> int:
    """Make sessions durable; returns how many there were: some may have ended.

    Raises:
        StorageError: one of them cannot be written now.
        RateLimited: the caller may have no more on disk.
    """
    num = 0
    for session in sessions:
        with suppress(UnknownSession):
            await persist_session(service, caller, session, "")
            num += 1
    return num


def adopt_all(heads: list[SandboxHead], now: float) -> list[Sandbox]:
    """The sandboxes that are on disk; their states are read at their first use. `now` is the clock of `Sandboxes`."""
    found: dict[str, Sandbox] = {}
    for head in sorted(heads, key=lambda head: head.version):  # sandboxes before their versions
        sandbox = found.get(head.sandbox_id)
        if sandbox is None:
            state = State(version=head.runtime, variables=head.variables, remembered=head.remembered)
            kept = Kept(unread=True, persisted=head.persisted)
            sandbox = Sandbox(
                head.sandbox_id, head.tenant, head.name, head.model, now, head.parent_id, state, kept=kept
            )
            found[head.sandbox_id] = sandbox
        if head.version:
            sandbox.kept.versions |= {head.version}
    return list(found.values())


def record_of(sandbox: Sandbox, state: State, version: str, options: KeepingOptions, now: float) -> SandboxRecord:
    """A sandbox with this state as it is stored. `now` is the wall clock."""
    persisted = sandbox.kept.persisted
    return SandboxRecord(
        sandbox_id=sandbox.sandbox_id,
        tenant=sandbox.owner,
        name=sandbox.name,
        version=version,
        model=sandbox.model,
        runtime=state.version,
        parent_id=sandbox.parent,
        persisted=persisted,
        ttl_s=options.persisted_ttl_s if persisted else options.ttl_s,
        saved_at=now,
        used_at=now,
        variables=dict(state.variables),
        remembered=dict(state.remembered),
        can_replay=state.journal.is_whole,
        dump=state.dump,
        journal=state.journal.to_bytes(),
    )


def state_from(record: SandboxRecord) -> State:
    """The state that a record has."""
    journal = Journal.from_bytes(record.journal, record.can_replay)
    return State(record.dump, record.runtime, record.variables, record.remembered, journal)
