"""What the engine keeps on disk, and how it gets it back: the store, and the sessions that were persisted.

Decides on the engine thread; files are read and written elsewhere, by `Io`, while the engine goes on. What comes back
is a value (`results.py`), which the engine hands to the method here that takes it:

    open      the store, with the sessions that are known to be in it → opened
    persist   a session's blocks, then its tokens → the store → written, when they would survive a power cut
    read      a session that is only on disk ← its tokens, at its first use → session_read
    remove    what is on disk of sessions that were closed

Evicted blocks go through `offload.py`, and come back through `restoring.py`.
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
from mlx_mcp.core.durable import SessionRecord, Store, said_of_old
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

logger = logging.getLogger(__name__)

BATCH_BYTES = 32 << 20  # written at a time while the engine computes
PAUSE = 1.5  # times as long as that took: so most steps do not notice


@dataclass(frozen=True)
class PersistenceOptions:
    """How things are kept outside of memory."""

    offload: bool = True  # evicted blocks too, not only what was persisted
    autosave_s: float | None = None  # persist every session so often, and when the engine ends; None: only when asked
    unused_ttl_s: float = 30 * 86400.0  # how long a persisted session lasts unused, if it does not say


@dataclass(frozen=True)
class Persisting:
    """Where sessions and evicted blocks are kept outside of memory, and who reads and writes there."""

    open_store: Callable[[], Store]
    io: Io
    options: PersistenceOptions = PersistenceOptions()
    wall_clock: Callable[[], float] = time.time


@dataclass(frozen=True)
class Writing:
    """A session on its way to the store."""

    session: Session
    log: tuple[int, ...]  # its tokens as they were
    last_block: Block | None  # of those in memory, which stay there until then


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
        self.failure: MlxMcpError | None = None  # why there is none, or what was last to be written was not
        self.opening = True
        self.reading: set[SessionReading] = set()  # what is under way
        self.writing: dict[int, Writing] = {}
        self.num_writings = 0
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
        """What EngineStats says of it."""
        return {
            "storage": "ok" if self.failure is None else str(self.failure),
            "offloaded": self.offload.num_offloaded,
            "dropped": self.offload.num_dropped,
            "restored": self.restoring.num_restored,
        }

    @property
    def references(self) -> list[Block]:
        """The blocks that sessions on their way to the store end with."""
        return [writing.last_block for writing in self.writing.values() if writing.last_block is not None]

    @property
    def all_saved(self) -> bool:
        """Whether no session is on its way to the disk, now or when the store has been opened."""
        return not (self.writing or self.opening)

    def on_store_opened(self, result: StoreOpened) -> None:
        """Know the sessions on disk."""
        self.opening = False
        if isinstance(result.outcome, MlxMcpError):
            self.failure = result.outcome
            logger.warning("nothing is kept on disk: %s", result.outcome)
        else:
            self.store = self.offload.store = self.restoring.store = result.outcome
            self.sessions.adopt_all(list(result.heads))
            if result.outcome.sessions.num_old:
                logger.warning("%s", said_of_old(result.outcome.sessions.num_old))

    def require_store(self) -> Store:
        """The store.

        Raises:
            StorageError: there is none.
        """
        if self.store is None:
            raise self.failure or StorageError("Nothing is kept on disk.")
        return self.store

    def on_blocks_written(self, result: BlocksWritten) -> None:
        """Take what came of evicted blocks."""
        self.offload.on_blocks_written(result)
        self.failure = result.outcome if isinstance(result.outcome, MlxMcpError) else None

    # Sessions

    def persist(self, session: Session, version: str = "") -> SessionWriting:
        """Make a session durable as it is, with a `version` of that name if one is given; returns what to wait for.

        Its blocks stay in memory until then.

        Raises:
            StorageError: there is no store.
        """
        store, log, unverified, tokenizer = self.require_store(), session.log, session.unverified, session.tokenizer
        blocks, keys, num_kept = self._stored_blocks(session, store)
        last_block = blocks[-1] if blocks else None
        if last_block is not None:
            self.cache.pool.acquire(last_block)
        packed = [to_stored(block) for block in blocks if store.tier.find(block.key) is None]
        after, fingerprint = session.after, session.fingerprint  # as they are now, whatever turns come meanwhile
        options, now, ttl_s = session.options, self.wall_clock(), session.ttl_s
        if options.ttl_s is None:
            ttl_s = max(ttl_s, self.options.unused_ttl_s)
        self.num_writings += 1
        self.writing[self.num_writings] = Writing(session, log, last_block)
        session.num_saving += 1

        def write() -> tuple[SessionRecord, int]:
            digest, text = b"", ""
            if tokenizer is not None:
                digest, text = tokenizer.digest, tokenizer.transcript(log)
            elif unverified is not None:
                digest, text = unverified.tokenizer, unverified.text
            record = SessionRecord(
                session_id=session.session_id,
                tenant=session.tenant,
                model=session.model,
                name=options.name,
                version="",
                fingerprint=fingerprint,
                tokenizer=digest,
                text=text,
                tokens=log,
                num_kept=num_kept,
                after=after,
                tools=session.tools,
                parent_id=session.parent_id,
                ttl_s=ttl_s,
                pinned=options.pinned,
                ephemeral=False,
                saved_at=now,
                used_at=now,
                blocks=keys,
            )
            num_bytes = self._write_in_batches(store, packed[:-1])
            num_bytes += store.persist(packed[-1:], record)
            if version:
                record = replace(record, version=version)
                num_bytes += store.persist((), record)
            return record, num_bytes

        self.io.submit(write, partial(SessionWritten, self.num_writings))
        return SessionWriting(self.num_writings)

    def on_session_written(self, result: SessionWritten) -> Session:
        """Note that a session is on disk, or is not; returns it."""
        writing, outcome = self.writing.pop(result.number), result.outcome
        session = writing.session
        session.num_saving -= 1
        self.failure = outcome if isinstance(outcome, MlxMcpError) else None
        if writing.last_block is not None:
            self.cache.pool.release(writing.last_block)
        if not isinstance(outcome, MlxMcpError) and self.sessions.is_open(session):
            # The log itself, not what came back equal: whether a session has changed since is told by identity.
            self.sessions.note_saved(session, replace(outcome[0], tokens=writing.log))
        return session

    def _write_in_batches(self, store: Store, blocks: list[StoredBlock]) -> int:
        """Write blocks, with pauses while the engine computes: steps share cores and memory with the disk.

        Returns the bytes written. On the thread that writes.
        """
        num_bytes, batch, size = 0, list[StoredBlock](), 0
        for i, block in enumerate(blocks):
            batch.append(block)
            size += block.nbytes
            if size >= BATCH_BYTES or i == len(blocks) - 1:
                started = time.monotonic()
                num_bytes += store.tier.put(batch)
                if self.engine_busy:
                    time.sleep(PAUSE * (time.monotonic() - started))
                batch, size = [], 0
        return num_bytes

    def _stored_blocks(self, session: Session, store: Store) -> tuple[list[Block], tuple[bytes, ...], int]:
        """A session's blocks that are in memory, the keys of these and of those after them in the store, and tokens."""
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
        """Have a session's tokens in memory again; returns why whoever waited for them must not look again."""
        self.reading.discard(SessionReading(result.session_id))
        session, outcome = self.sessions.sessions.get(result.session_id), result.outcome
        if isinstance(outcome, MlxMcpError):
            return outcome
        if session is None or not session.on_disk_only or session.on_disk_version != result.version:
            return None  # it was closed or replaced meanwhile, or that version of it was removed and there is another
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
        """Begin to remove what is on disk of sessions that were closed, by a call; returns whether there is any.

        `closed` is what the call is answered at last: the sessions as they were.
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
        """Persist every session that has changed since it was persisted, but for ephemeral ones."""
        self.saved_at = self.clock()
        if self.store is None:
            return
        for session in list(self.sessions.sessions.values()):
            if session.log and session.log is not session.saved_log and not session.options.ephemeral:
                self.persist(session)

    def close(self, deadline: float) -> None:
        """Let the store go after what it was given; what has not come in by then, by time.monotonic, is lost."""
        store = self.store
        self.io.close(lambda: None if store is None else store.close(), max(0.1, deadline - time.monotonic()))

    def autosave_if_due(self) -> None:
        """Persist what has changed, if it is time."""
        autosave_s = self.options.autosave_s
        if autosave_s is not None and self.clock() - self.saved_at >= autosave_s:
            self.save_changed()
