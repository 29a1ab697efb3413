"""The store as the engine uses it: persists sessions, reads them again, and removes them.

Decides on the engine thread. `Io` reads and writes files elsewhere, while the engine continues. The result comes back
as a value (`results.py`), which the engine passes to the method named on_…:

    open      the store, with the heads of the sessions in it
    persist   a session's blocks, and then its tokens; they survive a power cut when the result comes back
    read      the tokens of a session that is only on disk, at its first use
    remove    sessions that were closed

Evicted blocks are written by `offload.py`, and read by `restoring.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlx_mcp.core.cache.blocks import Block
from mlx_mcp.core.cache.prefixes import PrefixCache
from mlx_mcp.core.durable import SessionRecord, Store, old_sessions_warning
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.core.session import Session, SessionInfo, SessionStore
from mlx_mcp.engine.awaited import SessionReading, SessionWriting
from mlx_mcp.engine.call import Calls
from mlx_mcp.engine.io_thread import Io
from mlx_mcp.engine.offload import Offload, to_stored
from mlx_mcp.engine.restoring import Restoring
from mlx_mcp.engine.results import (
    BlocksWritten,
    SessionRead,
    SessionsRemoved,
    SessionWritten,
    StoreOpened,
    VersionRead,
)
from mlx_mcp.errors import MlxMcpError, StorageError, UnknownSession
from mlx_mcp.stats import LONG_BOUNDS_S, Histogram

logger = logging.getLogger(__name__)

BATCH_BYTES = 32 << 20  # are written at a time while the engine computes
PAUSE = 1.5  # times as long as that took; then most steps are not delayed


@dataclass(frozen=True)
class PersistenceOptions:
    """What is stored outside of memory, and for how long."""

    offload: bool = True  # evicted blocks too, not only those of persisted sessions
    autosave_s: float | None = None  # persist every session so often, and when the engine ends; None: only when asked
    unused_ttl_s: float = 30 * 86400.0  # the least time to live of a persisted session that was given none


@dataclass(frozen=True)
class Persisting:
    """The store, the thread that reads and writes there, and its clock."""

    open_store: Callable[[], Store]
    io: Io
    options: PersistenceOptions = PersistenceOptions()
    wall_clock: Callable[[], float] = time.time


@dataclass(frozen=True)
class Writing:
    """A session that is being written."""

    session: Session
    log: tuple[int, ...]  # its tokens when that began
    last_block: Block | None  # the last of its blocks in memory, which are not evicted meanwhile
    began_at: float


class Persistence:
    """The store as the engine uses it. Engine thread only."""

    def __init__(
        self,
        persisting: Persisting,
        calls: Calls,
        cache: PrefixCache,
        sessions: SessionStore,
        clock: Callable[[], float],
    ) -> None:
        self.io, self.options, self.wall_clock = persisting.io, persisting.options, persisting.wall_clock
        self.cache, self.sessions, self.clock = cache, sessions, clock
        self.offload = Offload(self.io, cache.pool, self.options.offload)
        self.restoring = Restoring(calls, self.io, clock)
        self.store: Store | None = None
        self.failure: MlxMcpError | None = None  # why there is no store, or why the latest write failed
        self.opening = True
        self.reading: set[SessionReading] = set()  # the sessions that are being read
        self.writing: dict[int, Writing] = {}
        self.num_writings = self.num_written = self.num_failed = 0
        self.persist_s = Histogram(LONG_BOUNDS_S)
        self.engine_busy = False  # read on the thread that writes
        self.saved_at = clock()
        open_store = persisting.open_store

        def begin() -> StoreOpened:
            store = open_store()
            return StoreOpened(store, tuple(store.sessions.heads()))

        def opened(outcome: StoreOpened | MlxMcpError) -> StoreOpened:
            return StoreOpened(outcome) if isinstance(outcome, MlxMcpError) else outcome

        self.io.submit(begin, opened, urgent=True)

    @property
    def counts(self) -> dict[str, Any]:
        """The fields of EngineStats about it."""
        tier = None if self.store is None else self.store.tier
        return {
            "storage": "ok" if self.failure is None else str(self.failure),
            "offloaded": self.offload.num_offloaded,
            "dropped": self.offload.num_dropped,
            "restored": self.restoring.num_restored,
            "opening": self.opening,
            "pending_bytes": self.offload.queue_bytes,
            "persists": self.num_written,
            "persist_failures": self.num_failed,
            "persist_s": self.persist_s.snapshot,
            "disk_bytes": 0 if tier is None else tier.nbytes,
            "disk_evictions": 0 if tier is None else tier.num_evicted,
        }

    @property
    def references(self) -> list[Block]:
        """The last blocks of sessions that are being written, which are acquired."""
        return [writing.last_block for writing in self.writing.values() if writing.last_block is not None]

    @property
    def all_saved(self) -> bool:
        """Whether no session is being written, or waits for the store to be opened."""
        return not (self.writing or self.opening)

    def on_store_opened(self, result: StoreOpened) -> None:
        """Take the store, and add the sessions in it."""
        self.opening = False
        if isinstance(result.outcome, MlxMcpError):
            self.failure = result.outcome
            logger.warning("nothing is kept on disk: %s", result.outcome)
        else:
            self.store = self.offload.store = self.restoring.store = result.outcome
            self.sessions.adopt_all(list(result.heads))
            if result.outcome.sessions.num_old:
                logger.warning("%s", old_sessions_warning(result.outcome.sessions.num_old))

    def require_store(self) -> Store:
        """The store.

        Raises:
            StorageError: there is no store.
        """
        if self.store is None:
            raise self.failure or StorageError(
                "Nothing is kept on disk. Have the server started with max_ssd_bytes above 0."
            )
        return self.store

    def on_blocks_written(self, result: BlocksWritten) -> None:
        """Take the result of writing evicted blocks."""
        self.offload.on_blocks_written(result)
        self.failure = result.outcome if isinstance(result.outcome, MlxMcpError) else None

    # Sessions

    def persist(self, session: Session, version: str = "") -> SessionWriting:
        """Begin to make a session durable as it is, and a `version` of it if one is named; returns what to wait for.

        Its blocks stay in memory until then.

        Raises:
            StorageError: there is no store.
        """
        store, log, unverified, tokenizer = self.require_store(), session.log, session.unverified, session.tokenizer
        blocks, keys, num_kept = stored_blocks(session, store)
        last_block = blocks[-1] if blocks else None
        if last_block is not None:
            self.cache.pool.acquire(last_block)
        packed = [to_stored(block) for block in blocks if store.tier.find(block.key) is None]
        ttl_s = session.ttl_s if session.options.ttl_s is not None else max(session.ttl_s, self.options.unused_ttl_s)
        described = record_of(session, keys, num_kept, ttl_s, self.wall_clock())
        self.num_writings += 1
        self.writing[self.num_writings] = Writing(session, log, last_block, self.clock())
        session.num_saving += 1

        def write() -> tuple[SessionRecord, int]:
            record = described
            if tokenizer is not None:
                text = tokenizer.transcript(log, tuple(origin.begin for origin in described.origins))
                record = replace(record, tokenizer=tokenizer.digest, text=text)
            elif unverified is not None:
                record = replace(record, tokenizer=unverified.tokenizer, text=unverified.text)
            num_bytes = write_in_batches(store, packed[:-1], lambda: self.engine_busy)
            num_bytes += store.persist(packed[-1:], record)
            if version:
                record = replace(record, version=version)
                num_bytes += store.persist((), record)
            return record, num_bytes

        self.io.submit(write, partial(SessionWritten, self.num_writings))
        return SessionWriting(self.num_writings)

    def on_session_written(self, result: SessionWritten) -> Session:
        """Take the result of writing a session; returns the session."""
        writing, outcome = self.writing.pop(result.number), result.outcome
        session = writing.session
        session.num_saving -= 1
        self.failure = outcome if isinstance(outcome, MlxMcpError) else None
        if self.failure is None:
            self.num_written += 1
            self.persist_s.observe(self.clock() - writing.began_at)
        else:
            self.num_failed += 1
        if writing.last_block is not None:
            self.cache.pool.release(writing.last_block)
        if not isinstance(outcome, MlxMcpError) and self.sessions.is_open(session):
            # The log itself, not an equal one: whether a session has changed since is told by identity.
            self.sessions.note_saved(session, replace(outcome[0], tokens=writing.log))
        return session

    def read(self, session: Session) -> SessionReading:
        """Begin to read the tokens of a session that is only on disk; returns what to wait for.

        Raises:
            StorageError: there is no store.
        """
        store, session_id, version = self.require_store(), session.session_id, session.on_disk_version
        key = SessionReading(session_id)
        if key not in self.reading:
            self.reading.add(key)
            self.io.submit(
                lambda: store.sessions.load(session_id, version), partial(SessionRead, session_id, version), urgent=True
            )
        return key

    def on_session_read(self, result: SessionRead) -> MlxMcpError | None:
        """Take the tokens of a session; returns the error for the calls that waited for them, None if there is none."""
        self.reading.discard(SessionReading(result.session_id))
        session, outcome = self.sessions.sessions.get(result.session_id), result.outcome
        if isinstance(outcome, MlxMcpError):
            return outcome
        if session is None or not session.on_disk_only or session.on_disk_version != result.version:
            return None  # it was closed or replaced meanwhile, or the version was removed and another is left
        if outcome is None:
            self.sessions.close(session)
            return UnknownSession(result.session_id, damaged=True)
        self.sessions.load(session, outcome)
        return None

    def read_version(self, session: Session, version: str, call_id: int) -> None:
        """Begin to read a named version of a session for a call.

        Raises:
            StorageError: there is no store.
        """
        store, session_id = self.require_store(), session.session_id
        self.io.submit(lambda: store.sessions.load(session_id, version), partial(VersionRead, call_id), urgent=True)

    def remove(self, sessions: list[Session], call_id: int = 0, closed: tuple[SessionInfo, ...] = ()) -> bool:
        """Begin to remove closed sessions from disk; returns whether any of them is there.

        `closed` are the sessions as they were, for the answer to the call that closed them.
        """
        ids, store = [session.session_id for session in sessions if session.persisted], self.store
        if not ids or store is None:
            return False

        def work() -> None:
            for session_id in ids:
                store.remove(session_id)

        self.io.submit(work, partial(SessionsRemoved, call_id, closed))
        return True

    def save_changed(self) -> None:
        """Persist every session that has changed since it was persisted, except ephemeral ones."""
        self.saved_at = self.clock()
        if self.store is None:
            return
        for session in list(self.sessions.sessions.values()):
            if session.log and session.log is not session.saved_log and not session.options.ephemeral:
                self.persist(session)

    def close(self, deadline: float) -> None:
        """Close the store after all submitted work. What is not done at `deadline`, by time.monotonic, is lost."""
        store = self.store
        self.io.close(lambda: None if store is None else store.close(), max(0.1, deadline - time.monotonic()))

    def autosave_if_due(self) -> None:
        """Persist what has changed, if `autosave_s` have passed."""
        autosave_s = self.options.autosave_s
        if autosave_s is not None and self.clock() - self.saved_at >= autosave_s:
            self.save_changed()


def write_in_batches(store: Store, blocks: list[StoredBlock], is_engine_busy: Callable[[], bool]) -> int:
    """Write blocks, with pauses while the engine computes: steps share cores and memory with the disk.

    Returns the bytes written. Called on the I/O thread.
    """
    num_bytes, batch, size = 0, list[StoredBlock](), 0
    for i, block in enumerate(blocks):
        batch.append(block)
        size += block.nbytes
        if size >= BATCH_BYTES or i == len(blocks) - 1:
            started = time.monotonic()
            num_bytes += store.tier.put(batch)
            if is_engine_busy():
                time.sleep(PAUSE * (time.monotonic() - started))
            batch, size = [], 0
    return num_bytes


def stored_blocks(session: Session, store: Store) -> tuple[list[Block], tuple[bytes, ...], int]:
    """A session's blocks in memory, the keys of its blocks in memory or in the store, and how many tokens these have.

    They end before the first block that is in neither.
    """
    if session.leaf is None:
        keys = tuple(key for key in session.keys if store.tier.find(key) is not None)
        return ([], session.keys, session.num_kept) if keys == session.keys else ([], (), 0)
    blocks: list[Block] = []
    keys, end = (), 0
    for block in reversed(list(session.leaf.chain())):
        if block.payload is not None:
            blocks.append(block)
        elif store.tier.find(block.key) is None:
            break
        keys, end = (*keys, block.key), block.end
    return blocks, keys, end


def record_of(session: Session, keys: tuple[bytes, ...], num_kept: int, ttl_s: float, now: float) -> SessionRecord:
    """The record of a session as it is now, without what a tokenizer must say of it. `now` is the wall clock."""
    return SessionRecord(
        session_id=session.session_id,
        tenant=session.tenant,
        model=session.model,
        name=session.options.name,
        version="",
        fingerprint=session.fingerprint,
        tokenizer=b"",
        text="",
        tokens=session.log,
        num_kept=num_kept,
        after=session.after,
        tools=session.tools,
        parent_id=session.parent_id,
        ttl_s=ttl_s,
        pinned=session.options.pinned,
        ephemeral=False,
        saved_at=now,
        used_at=now,
        blocks=keys,
        origins=session.origins,
    )
