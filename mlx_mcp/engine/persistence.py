"""What the engine keeps outside of memory, and how it gets it back: evicted blocks, and sessions that were persisted.

Decides on the engine thread; files are read and written elsewhere, by `Io`, while the engine goes on:

    offload   an evicted block that was used twice → bytes → the store, unless too many are on their way already
    fetch     a call that waits ← the blocks after what memory has of it, if loading them beats computing them
    persist   a session's blocks, then its tokens → the store; told when they would survive a power cut
    wake      a session that rests on disk ← its tokens, at its first use

Until the store has been opened, whatever is about sessions waits for it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_mcp.core.cache.blocks import Block
from mlx_mcp.core.cache.manager import KvCacheManager
from mlx_mcp.core.cache.prefixes import PrefixCache
from mlx_mcp.core.cache.tiers import Wanted
from mlx_mcp.core.durable import SessionRecord, Store, said_of_old
from mlx_mcp.core.layout import Payload
from mlx_mcp.core.ports import ModelRunner, StoredBlock
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.session import Session, SessionStore
from mlx_mcp.engine.io_thread import Io
from mlx_mcp.errors import MlxMcpError, StorageError, UnknownSession

logger = logging.getLogger(__name__)

QUEUE_SHARE = 16  # blocks on their way to the store take at most this part of all memory for keys and values
MAX_QUEUE_BYTES = 64 << 20
SMOOTHING = 0.3  # how much the latest measurement counts
MEASURED_BYTES = 1 << 20  # what is less says more of the way there than of the rate
MEASURED_TOKENS = 64
TURN_BYTES = 32 << 20  # written at a time while the engine computes
PAUSE = 1.5  # times as long as that took: so most steps do not notice


@dataclass(frozen=True)
class PersistenceOptions:
    """How things are kept outside of memory."""

    offload: bool = True  # evicted blocks too, not only what was persisted
    autosave_s: float | None = None  # persist every session so often, and when the engine ends; None: only when asked
    keep_s: float = 30 * 86400.0  # how long a persisted session lasts unused, if it does not say


@dataclass
class Rate:
    """How fast something goes, by the latest measurements."""

    per_s: float = 0.0

    def take(self, amount: float, seconds: float) -> None:
        """Take a measurement."""
        measured = amount / max(seconds, 1e-6)
        self.per_s = measured if not self.per_s else self.per_s + SMOOTHING * (measured - self.per_s)

    def seconds(self, amount: float) -> float:
        """How long so much takes; 0 while nothing was measured."""
        return amount / self.per_s if self.per_s else 0.0


Loaded = list[tuple[StoredBlock, Callable[[], Payload]]]


@dataclass(eq=False)
class Fetch:
    """Blocks on their way into memory, and who waits for them."""

    keys: frozenset[bytes]
    waiting: list[tuple[Sequence, KvCacheManager]] = field(default_factory=list)


class Persistence:
    """The store as the engine uses it. Engine thread only."""

    def __init__(
        self,
        open_store: Callable[[], Store],
        io: Io,
        cache: PrefixCache,
        sessions: SessionStore,
        options: PersistenceOptions,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.io, self.cache, self.sessions, self.options = io, cache, sessions, options
        self.clock, self.wall_clock = clock, wall_clock
        self.store: Store | None = None
        self.failure: MlxMcpError | None = None  # why there is none, or what was last to be written was not
        self.opening = True
        self.early: deque[Callable[[], None]] = deque()  # what waits for the store
        self.waking: dict[Session, list[Callable[[MlxMcpError | None], None]]] = {}
        self.fetches: list[Fetch] = []
        self.evicted: list[StoredBlock] = []
        self.queue_bytes = 0  # of blocks on their way to the store
        self.num_saving = 0  # sessions on their way there
        self.references: list[Block] = []  # the blocks that these end with, which stay in memory until then
        self.max_queue_bytes = min(MAX_QUEUE_BYTES, cache.pool.ledger.limit_bytes // QUEUE_SHARE)
        # What is on its way still takes memory: it is set aside once and for all.
        cache.pool.ledger.limit_bytes -= self.max_queue_bytes
        self.reading, self.prefilling = Rate(), Rate()  # bytes, tokens
        self.num_offloaded = self.num_dropped = self.num_restored = self.num_recomputed = 0
        self.engine_busy = False  # read on the thread that writes
        self.saved_at = clock()
        if options.offload:
            cache.pool.on_evict = self.offload
        io.submit(open_store, self._opened, urgent=True)

    @property
    def counts(self) -> dict[str, Any]:
        """What EngineStats says of it."""
        return {
            "storage": "ok" if self.failure is None else str(self.failure),
            "offloaded": self.num_offloaded,
            "dropped": self.num_dropped,
            "restored": self.num_restored,
        }

    def when_open(self, do: Callable[[], None]) -> None:
        """Do it now, or once the sessions on disk are known."""
        if self.opening:
            self.early.append(do)
        else:
            do()

    def _opened(self, outcome: Store | MlxMcpError) -> None:
        self.opening = False
        if isinstance(outcome, MlxMcpError):
            self.failure = outcome
            logger.warning("nothing is kept on disk: %s", outcome)
        else:
            self.store = outcome
            self.sessions.adopt_all(outcome.sessions.heads())
            if outcome.sessions.num_old:
                logger.warning("%s", said_of_old(outcome.sessions.num_old))
        while self.early:
            self.early.popleft()()

    def the_store(self) -> Store:
        """The store.

        Raises:
            StorageError: there is none.
        """
        if self.store is None:
            raise self.failure or StorageError("Nothing is kept on disk.")
        return self.store

    # Evicted blocks

    def offload(self, block: Block) -> None:
        """Have a block that is about to be evicted written, if it was used again and there is room on the way."""
        payload, store = block.payload, self.store
        if payload is None or store is None or not block.num_hits or block.private:
            return
        entry = store.tier.find(block.key)
        if entry is not None and (entry.has_state or not payload.has_state):
            return
        if self.queue_bytes + payload.nbytes > self.max_queue_bytes:
            self.num_dropped += 1
            return
        self.queue_bytes += payload.nbytes
        self.evicted.append(stored(block))

    def flush(self) -> None:
        """Send what was evicted on its way; call it after each step."""
        if not self.evicted:
            return
        blocks, self.evicted = self.evicted[::-1], []  # parents first: leaves are evicted before them
        size = sum(block.nbytes for block in blocks)

        def told(outcome: int | MlxMcpError) -> None:
            self.queue_bytes -= size
            self.failure = outcome if isinstance(outcome, MlxMcpError) else None
            if isinstance(outcome, MlxMcpError):
                logger.warning("evicted blocks were not kept: %s", outcome)
            if isinstance(outcome, MlxMcpError) or not outcome:  # or the day's budget is spent
                self.num_dropped += len(blocks)
            else:
                self.num_offloaded += len(blocks)

        store = self.the_store()
        self.io.submit(lambda: store.tier.put(blocks, offload=True), told)

    # Blocks that come back

    def fetch(self, sequence: Sequence, cache: KvCacheManager, runner: ModelRunner) -> None:
        """Have a sequence that waits wait for what the store has of it too, if that is sooner there than computed."""
        if self.store is None:
            return
        store = self.store
        wanted = cache.wanted(sequence, store.tier.find)
        if not wanted:
            return
        if not self._pays(wanted):
            cache.pass_over(sequence)
            return
        cache.fetch(sequence)
        keys = frozenset(each.key for each in wanted)
        for fetch in self.fetches:
            if wanted[0].key in fetch.keys:
                fetch.waiting.append((sequence, cache))
                return
        fetch = Fetch(keys, [(sequence, cache)])
        self.fetches.append(fetch)
        started, num_bytes = self.clock(), sum(each.entry.nbytes for each in wanted)

        def load() -> Loaded:
            blocks: Loaded = []
            for block in store.tier.get([each.key for each in wanted]):
                try:
                    blocks.append((block, runner.unpack(block)))
                except ValueError:  # sound bytes of something else
                    break
            return blocks

        def told(outcome: Loaded | MlxMcpError) -> None:
            self.fetches.remove(fetch)
            if isinstance(outcome, MlxMcpError):
                logger.warning("blocks were not restored: %s", outcome)
                outcome = []
            elif outcome and num_bytes >= MEASURED_BYTES:
                self.reading.take(num_bytes, self.clock() - started)
            blocks = []
            try:
                blocks += [(block, make()) for block, make in outcome]
            except Exception:  # MLX's; what does not come back is computed
                logger.exception("blocks were not restored")
            self.num_restored += len(blocks)
            (first, manager), *others = fetch.waiting
            manager.arrived(first, blocks)
            for other, manager in others:
                manager.arrived(other, [])
                if other in manager.tracks:  # it may want more than the first did
                    self.fetch(other, manager, runner)

        self.io.submit(load, told, urgent=True)

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Take how long a step took that did nothing but read prompts."""
        if num_tokens >= MEASURED_TOKENS:
            self.prefilling.take(num_tokens, seconds)

    def _pays(self, wanted: list[Wanted]) -> bool:
        """Whether loading is faster than computing, by what was measured; the first time is tried."""
        num_tokens, num_bytes = wanted[-1].end - wanted[0].start, sum(each.entry.nbytes for each in wanted)
        loading_s, computing_s = self.reading.seconds(num_bytes), self.prefilling.seconds(num_tokens)
        pays = not loading_s or not computing_s or loading_s < computing_s
        self.num_recomputed += not pays
        return pays

    # Sessions

    def persist(
        self, session: Session, version: str, told: Callable[[tuple[SessionRecord, int] | MlxMcpError], None]
    ) -> None:
        """Make a session durable as it is, with a `version` of that name if one is given.

        `told` hears of the latest record and the bytes of blocks that were written, or why not. Its blocks stay in
        memory until then.

        Raises:
            StorageError: there is no store.
        """
        store, log, foreign, tokenizer = self.the_store(), session.log, session.foreign, session.tokenizer
        blocks, keys, num_kept = self._kept(session, store)
        held = blocks[-1] if blocks else None
        if held is not None:
            self.cache.pool.acquire(held)
            self.references.append(held)
        packed = [stored(block) for block in blocks if store.tier.find(block.key) is None]
        after, fingerprint = session.after, session.fingerprint  # as they are now, whatever turns come meanwhile
        options, now, ttl_s = session.options, self.wall_clock(), session.ttl_s
        if options.ttl_s is None:
            ttl_s = max(ttl_s, self.options.keep_s)
        self.num_saving += 1
        session.num_saving += 1

        def write() -> tuple[SessionRecord, int]:
            digest, text = b"", ""
            if tokenizer is not None:
                digest, text = tokenizer.digest, tokenizer.transcript(log)
            elif foreign is not None:
                digest, text = foreign.tokenizer, foreign.text
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
            num_bytes = self._write_in_turns(store, packed[:-1])
            num_bytes += store.persist(packed[-1:], record)
            if version:
                record = replace(record, version=version)
                num_bytes += store.persist((), record)
            return record, num_bytes

        def done(outcome: tuple[SessionRecord, int] | MlxMcpError) -> None:
            self.num_saving -= 1
            session.num_saving -= 1
            self.failure = outcome if isinstance(outcome, MlxMcpError) else None
            if held is not None:
                self.references.remove(held)
                self.cache.pool.release(held)
            if not isinstance(outcome, MlxMcpError) and self.sessions.is_open(session):
                self.sessions.saved(session, outcome[0])
            told(outcome)

        self.io.submit(write, done)

    def _write_in_turns(self, store: Store, blocks: list[StoredBlock]) -> int:
        """Write blocks, with pauses while the engine computes: steps share cores and memory with the disk.

        Returns the bytes written. On the thread that writes.
        """
        num_bytes, batch, size = 0, list[StoredBlock](), 0
        for i, block in enumerate(blocks):
            batch.append(block)
            size += block.nbytes
            if size >= TURN_BYTES or i == len(blocks) - 1:
                started = time.monotonic()
                num_bytes += store.tier.put(batch)
                if self.engine_busy:
                    time.sleep(PAUSE * (time.monotonic() - started))
                batch, size = [], 0
        return num_bytes

    def _kept(self, session: Session, store: Store) -> tuple[list[Block], tuple[bytes, ...], int]:
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

    def wake(self, session: Session, then: Callable[[MlxMcpError | None], None]) -> None:
        """Have the tokens of a session that rests here again; `then` goes on, or hears why not."""
        self.waking.setdefault(session, []).append(then)
        if len(self.waking[session]) > 1:
            return
        store, version = self.the_store(), session.resting_as

        def done(outcome: SessionRecord | MlxMcpError | None) -> None:
            waiting, error = self.waking.pop(session), None
            if isinstance(outcome, MlxMcpError):
                error = outcome
            elif not self.sessions.is_open(session):
                error = UnknownSession(session.session_id)
            elif outcome is None and session.resting_as != version:  # that one was removed, and there is another
                for each in waiting:
                    self.wake(session, each)
                return
            elif outcome is None:
                self.sessions.close(session)
                error = UnknownSession(session.session_id, damaged=True)
            else:
                self.sessions.wake(session, outcome)
            for each in waiting:
                each(error)

        self.io.submit(lambda: store.sessions.load(session.session_id, version), done, urgent=True)

    def version(
        self, session: Session, version: str, then: Callable[[SessionRecord | MlxMcpError | None], None]
    ) -> None:
        """Read a named version of a session."""
        store = self.the_store()
        self.io.submit(lambda: store.sessions.load(session.session_id, version), then, urgent=True)

    def remove(self, sessions: list[Session], told: Callable[[MlxMcpError | None], None]) -> None:
        """Remove what is on disk of sessions that were closed."""
        ids = [session.session_id for session in sessions if session.persisted]
        if not ids or self.store is None:
            told(None)
            return
        store = self.store

        def work() -> None:
            for session_id in ids:
                store.remove(session_id)

        self.io.submit(work, told)

    def save_changed(self) -> None:
        """Persist every session that has changed since it was persisted, but for ephemeral ones."""
        self.saved_at = self.clock()
        if self.store is None:
            return
        for session in list(self.sessions.sessions.values()):
            if session.log and session.log is not session.saved and not session.options.ephemeral:
                self.persist(session, "", warn)

    def close(self, deadline: float) -> None:
        """Let the store go after what it was given; what has not come in by then, by time.monotonic, is lost."""
        store = self.store
        self.io.close(lambda: None if store is None else store.close(), max(0.1, deadline - time.monotonic()))

    def look_at_the_clock(self) -> None:
        """Persist what has changed, if it is time."""
        autosave_s = self.options.autosave_s
        if autosave_s is not None and self.clock() - self.saved_at >= autosave_s:
            self.save_changed()


def stored(block: Block) -> StoredBlock:
    """A block as the store takes it; its bytes are not copied."""
    payload, parent = block.payload, block.parent
    assert payload is not None, "an evicted block has no bytes"
    assert parent is not None, "a root has no bytes"
    form, data = payload.pack()
    return StoredBlock(
        block.key, parent.key, block.start, block.tokens, payload.window_start, payload.has_state, form, data
    )


def warn(outcome: object) -> None:
    """Tell the log what nobody else waits for."""
    if isinstance(outcome, MlxMcpError):
        logger.warning("a session was not persisted: %s", outcome)
