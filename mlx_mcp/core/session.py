"""Sessions: tokens kept between calls, and the block where their keys and values end. Knows no text and no threads.

A session's tokens are never rendered or encoded again. A fork shares the tokens and the blocks of its parent, and
copies nothing, however long they are. The keys and values may be evicted; the tokens stay until the session ends.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from mlx_mcp.core.cache.blocks import Block, BlockPool, walk
from mlx_mcp.core.durable import SessionHead, SessionRecord
from mlx_mcp.core.origin import Origin, is_sound, with_turn
from mlx_mcp.core.ports import ChatTokenizer
from mlx_mcp.core.session_names import HANDLE_PREFIX, SessionNames
from mlx_mcp.errors import CapacityError, InvalidRequest, SessionBusy, UnknownSession

MAX_FORKS = 64
HANDLE_BITS = 128


@dataclass(frozen=True)
class SessionOptions:
    """What a caller can choose for a session."""

    name: str = ""  # see SessionNames
    ttl_s: float | None = None  # it ends after so long without a turn or a fork; None: the server's default
    pinned: bool = False  # its keys and values are never evicted, unless pins would take more than half of all memory
    ephemeral: bool = False  # nothing of it outlives it: its own blocks are dropped when it ends


@dataclass(frozen=True)
class SessionInfo:
    """A snapshot of a session, for other threads."""

    session_id: str
    tenant: str
    model: str
    name: str
    num_tokens: int
    after: str  # the role whose message the tokens end in: "assistant", or "user" in a context that waits for a prompt
    tools: tuple[dict[str, Any], ...]
    parent_id: str
    pinned: bool
    ephemeral: bool
    ttl_s: float
    used_at: float  # by the engine's clock, seconds
    busy: bool
    num_cached: int  # the number of tokens whose keys and values are in memory
    persisted: bool = False  # it survives the process, as it was when it was last persisted
    versions: tuple[str, ...] = ()  # those that were persisted under a name


@dataclass(eq=False)
class Session:
    """One agent's context. Only the engine thread uses it."""

    session_id: str
    tenant: str
    model: str
    options: SessionOptions
    ttl_s: float
    used_at: float
    after: str
    tools: tuple[dict[str, Any], ...] = ()
    parent_id: str = ""
    log: tuple[int, ...] = ()  # shared with forks, and replaced as a whole
    origins: tuple[Origin, ...] = ()  # of its latest turns, in order; shared and replaced likewise
    leaf: Block | None = None  # where its keys and values end; they may have been evicted
    turn: int | None = None  # the sequence of the turn that is under way
    latest: tuple[int, int] = (0, 0)  # the sequence of the latest turn that ended, and where its output begins
    num_kept: int = 0  # the number of tokens whose keys and values there were after the latest turn, here or in a tier
    fingerprint: bytes = b""  # of what these were computed with
    tokenizer: ChatTokenizer | None = None  # what its tokens mean; None until it is used in this process
    # On disk:
    durable: tuple[int, int] | None = None  # how many of its tokens are there, and how many with keys and values
    saved_log: tuple[int, ...] | None = None  # the log that is there; None if it is not in memory
    num_saving: int = 0  # how often it is being written at the moment
    on_disk_only: bool = False  # whether its tokens are there and not in memory
    on_disk_version: str = ""  # the version in which they are there, if the session itself is not
    unverified: SessionRecord | None = None  # what was read, until its model's tokenizer has been compared with it
    keys: tuple[bytes, ...] = ()  # the keys of the blocks that it had there, until its next turn
    versions: frozenset[str] = frozenset()

    @property
    def known(self) -> bool:
        """Whether a turn of it has ended."""
        return bool(self.log) or self.on_disk_only

    @property
    def persisted(self) -> bool:
        """Whether it, or a version of it, is on disk or is being written there."""
        return self.durable is not None or bool(self.versions) or self.num_saving > 0

    @property
    def info(self) -> SessionInfo:
        """A snapshot of it as it is now."""
        leaf, options = self.leaf, self.options
        return SessionInfo(
            self.session_id,
            self.tenant,
            self.model,
            options.name,
            self.durable[0] if self.on_disk_only and self.durable is not None else len(self.log),
            self.after,
            self.tools,
            self.parent_id,
            options.pinned,
            options.ephemeral,
            self.ttl_s,
            self.used_at,
            self.turn is not None,
            leaf.end if leaf is not None and leaf.resident else 0,
            self.durable is not None,
            tuple(sorted(self.versions)),
        )

    def child(self, session_id: str, options: SessionOptions) -> Session:
        """A session with the same tokens, and without blocks in memory."""
        return Session(
            session_id,
            self.tenant,
            self.model,
            options,
            self.ttl_s,
            self.used_at,
            self.after,
            self.tools,
            self.session_id,
            self.log,
            self.origins,
            num_kept=self.num_kept,
            fingerprint=self.fingerprint,
            tokenizer=self.tokenizer,
            unverified=self.unverified,
            keys=self.keys,
        )


class SessionStore:
    """All sessions of all tenants."""

    def __init__(self, pool: BlockPool, clock: Callable[[], float], max_sessions: int, ttl_s: float) -> None:
        self.pool, self.clock, self.max_sessions, self.ttl_s = pool, clock, max_sessions, ttl_s
        self.sessions: dict[str, Session] = {}
        # Read by other threads: an entry is replaced, never changed.
        self.infos: dict[str, SessionInfo] = {}
        self.names = SessionNames()

    def get(self, tenant: str, session: str) -> Session:
        """The session of that handle or name.

        Raises:
            UnknownSession: the tenant has no such session, or has it no longer.
        """
        found = self.sessions.get(self.names.find(tenant, session) or session)
        if found is None or found.tenant != tenant:
            raise UnknownSession(session, names=self.names.of(tenant))
        return found

    def open(
        self, tenant: str, model: str, options: SessionOptions, tools: tuple[dict[str, Any], ...], turn: int
    ) -> Session:
        """Make a session without tokens, whose first turn is `turn`.

        Raises:
            InvalidRequest: the name cannot be one, or is taken.
            CapacityError: there are as many sessions as are allowed.
        """
        self._check_new(tenant, [options.name] if options.name else [], 1)
        ttl_s = self.ttl_s if options.ttl_s is None else options.ttl_s
        session = Session(handle(), tenant, model, options, ttl_s, self.clock(), "user", tools, turn=turn)
        self._add(session)
        return session

    def fork(
        self, session: Session, count: int, names: tuple[str, ...], at: SessionRecord | None = None
    ) -> list[Session]:
        """Make `count` sessions that continue where the parent's latest finished turn ended, or from the record `at`.

        Copies no tokens, keys or values, so the cost does not grow with the context. The forks have the options of the
        parent, but are not pinned.

        Raises:
            InvalidRequest: `count` is out of range, or a name cannot be one, or is taken.
            SessionBusy: the parent's first turn has not ended.
            CapacityError: there are as many sessions as are allowed.
        """
        assert at is not None or not session.on_disk_only, "a fork of a session whose tokens are not here"
        if not session.log and at is None:
            raise SessionBusy(session.session_id, first=True)
        if not 1 <= count <= MAX_FORKS:
            raise InvalidRequest(f"count is {count}; it must be from 1 to {MAX_FORKS}.")
        if names and len(names) != count:
            raise InvalidRequest(f"There are {len(names)} names for {count} forks; give one for each, or none.")
        self._check_new(session.tenant, names, count)
        self.use(session)
        children = []
        for i in range(count):
            options = SessionOptions(names[i] if names else "", session.options.ttl_s, False, session.options.ephemeral)
            child = session.child(handle(), options)
            if at is None:
                self._move_leaf(child, session.leaf)
            else:
                child.after, child.tools = at.after, at.tools
                fill_from(child, at)
            self._add(child)
            children.append(child)
        return children

    def begin(self, session: Session, turn: int) -> None:
        """Note that a turn of the session is under way."""
        assert session.turn in (None, turn), "two turns at once"
        session.turn = turn
        self.use(session)

    def finish(
        self, session: Session, log: tuple[int, ...], leaf: Block | None, after: str, origin: Origin | None = None
    ) -> None:
        """End a turn with the session's new tokens; `leaf` is the last block of those that have keys and values.

        `origin` is that of the turn; None if the session's latest turn only ends elsewhere.
        """
        if origin is not None:
            session.origins = with_turn(session.origins, origin, len(session.log))
        session.turn, session.log, session.after = None, log, after
        session.num_kept, session.keys = 0 if leaf is None else leaf.end, ()
        self._move_leaf(session, leaf)
        self.use(session)

    def shorten(self, session: Session, num_tokens: int) -> None:
        """Drop all tokens after the first `num_tokens`."""
        leaf = session.leaf
        while leaf is not None and leaf.end > num_tokens:
            leaf = leaf.parent
        if leaf is not None and leaf.parent is None:
            leaf = None
        self.finish(session, session.log[:num_tokens], leaf, session.after)

    def abandon(self, session: Session) -> None:
        """End a turn that failed or was cancelled. The session is as it was, or closed if this was its first turn."""
        session.turn = None
        if session.known:
            self.use(session)
        else:
            self.close(session)

    # Sessions on disk

    def adopt(self, head: SessionHead) -> Session:
        """Add a session that is on disk only. Its time to live begins anew.

        If another session has its name by now, it has none.
        """
        taken = self.names.find(head.tenant, head.name) is not None
        options = SessionOptions("" if taken else head.name, head.ttl_s, head.pinned)
        session = Session(
            head.session_id,
            head.tenant,
            head.model,
            options,
            self.ttl_s if head.ttl_s is None else head.ttl_s,
            self.clock(),
            head.after,
            head.tools,
            head.parent_id,
            durable=(head.num_tokens, head.num_kept),
            on_disk_only=True,
            on_disk_version=head.version,
        )
        self._add(session)
        return session

    def adopt_all(self, heads: list[SessionHead]) -> None:
        """Add all sessions that are on disk, with their versions."""
        for head in sorted(heads, key=lambda head: head.version):  # sessions before their versions
            session = self.sessions.get(head.session_id)
            if session is None:
                session = self.adopt(head)
            if head.version:
                session.versions |= {head.version}
                self.note(session)

    def note_removed(self, session: Session, left: list[SessionHead]) -> None:
        """Note that only these versions of a session are left on disk; close it if nothing is left of it."""
        session.versions = frozenset(head.version for head in left if head.version)
        if session.on_disk_only:
            rest = min(left, key=lambda head: (head.version != session.on_disk_version, head.version), default=None)
            if rest is None:
                self.close(session)
                return
            session.on_disk_version, session.durable = rest.version, (rest.num_tokens, rest.num_kept)
        elif len(session.versions) == len(left):  # none is the session itself
            session.durable = session.saved_log = None
        self.note(session)

    def is_open(self, session: Session) -> bool:
        """Whether it was not closed. Another session may have its handle since."""
        return self.sessions.get(session.session_id) is session

    def load(self, session: Session, record: SessionRecord) -> None:
        """Take the tokens of a session that was on disk only."""
        fill_from(session, record)
        session.on_disk_only, session.saved_log = False, record.tokens
        self.use(session)

    def note_saved(self, session: Session, record: SessionRecord) -> None:
        """Note that this record of a session is on disk now."""
        if record.version:
            session.versions |= {record.version}
        session.durable, session.saved_log = (len(record.tokens), record.num_kept), record.tokens
        session.ttl_s = self.ttl_s if record.ttl_s is None else record.ttl_s
        self.note(session)

    def note(self, session: Session) -> None:
        """Replace the snapshot that other threads see."""
        self.infos[session.session_id] = session.info

    def use(self, session: Session) -> None:
        """Note a use of a session: its time to live begins anew."""
        session.used_at = self.clock()
        self.note(session)

    def close(self, session: Session) -> None:
        """Forget a session. The caller has to end its turns."""
        del self.sessions[session.session_id], self.infos[session.session_id]
        self.names.remove(session.tenant, session.options.name)
        self._move_leaf(session, None)

    def expired(self) -> list[Session]:
        """The sessions that were not used for longer than their time to live."""
        now = self.clock()
        return [s for s in self.sessions.values() if s.turn is None and now - s.used_at > s.ttl_s]

    @property
    def references(self) -> list[Block]:
        """The last blocks of pinned sessions, each as often as a session has acquired it."""
        return [s.leaf for s in self.sessions.values() if s.leaf is not None and s.options.pinned]

    def check_integrity(self) -> None:
        """Prove that every session's block ends where its tokens say, and that blocks count their sessions right."""
        held: dict[Block, int] = {}
        for session in self.sessions.values():
            leaf = session.leaf
            assert is_sound(session.origins, len(session.log)), f"turns of {session.session_id} begin where it has none"
            if leaf is not None:
                held[leaf] = held.get(leaf, 0) + 1
                chain = list(leaf.chain())
                tokens = tuple(token for block in reversed(chain) for token in block.tokens)
                assert session.log[: leaf.end] == tokens, f"the blocks of {session.session_id} are another's"
                assert leaf.resident or not session.options.pinned, "a pinned session was evicted"
        blocks = {*held, *(block for root in self.pool.roots.values() for block in walk(root))}
        assert all(block.num_sessions == held.get(block, 0) for block in blocks), "blocks miscount their sessions"
        assert set(self.sessions) == set(self.infos), "the sessions and their snapshots differ"
        named = {(s.tenant, s.options.name): handle for handle, s in self.sessions.items() if s.options.name}
        assert self.names.ids == named, "the names are not the sessions'"

    def _add(self, session: Session) -> None:
        self.sessions[session.session_id] = session
        self.names.add(session.tenant, session.options.name, session.session_id)
        self.infos[session.session_id] = session.info

    def _move_leaf(self, session: Session, leaf: Block | None) -> None:
        """Make another block the session's last one, and move its pin there."""
        old, pinned = session.leaf, session.options.pinned
        if leaf is not None:
            self.pool.add_session(leaf)
            self.pool.touch(leaf)
            leaf.num_hits += 1
        if leaf is not None and pinned:
            self.pool.acquire(leaf)
            if self.pool.protected_bytes > self.pool.ledger.limit_bytes // 2:
                # Rows need room too, this session's own for its next turn among them.
                self.pool.release(leaf)
                session.options = replace(session.options, pinned=False)
        session.leaf = leaf
        if old is not None:
            if pinned:
                self.pool.release(old)
            self.pool.remove_session(old, whole=session.options.ephemeral and leaf is None)

    def _check_new(self, tenant: str, names: Seq[str], count: int) -> None:
        self.names.check(tenant, names)
        if len(self.sessions) + count > self.max_sessions:
            raise CapacityError(
                f"There are {len(self.sessions)} sessions, and may be {self.max_sessions}: close some (list_sessions "
                "shows them).",
                60,
            )


def fill_from(session: Session, record: SessionRecord) -> None:
    """Fill a session with what was read from disk."""
    session.log, session.num_kept, session.keys = record.tokens, record.num_kept, record.blocks
    session.origins = record.origins
    session.fingerprint, session.unverified = record.fingerprint, record


def handle() -> str:
    """A new handle, which nobody can guess."""
    return HANDLE_PREFIX + secrets.token_hex(HANDLE_BITS // 8)
