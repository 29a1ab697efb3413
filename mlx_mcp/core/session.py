"""What agents keep between calls: tokens, and the block where their keys and values end. Knows no text and no threads.

A session's tokens are never rendered or encoded again; a fork shares them, and the blocks, with its parent: it copies
nothing, however long they are. The keys and values may be evicted; the tokens stay until the session ends.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlx_mcp.core.cache.blocks import Block, BlockPool, walk
from mlx_mcp.core.durable import SessionHead, SessionRecord
from mlx_mcp.core.ports import ChatTokenizer
from mlx_mcp.errors import CapacityError, InvalidRequest, SessionBusy, UnknownSession

MAX_FORKS = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HANDLE_BITS = 128


@dataclass(frozen=True)
class SessionOptions:
    """How a session is kept."""

    name: str = ""  # for people; stands for the handle in every call of the same tenant
    ttl_s: float | None = None  # ends after so long without a turn or a fork; None: the server's default
    pinned: bool = False  # its keys and values are never evicted, unless pins would take more than half of all memory
    ephemeral: bool = False  # nothing of it outlives it: its own blocks go when it ends


@dataclass(frozen=True)
class SessionInfo:
    """A session as others see it."""

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
    num_cached: int  # tokens whose keys and values are there
    persisted: bool = False  # it survives the process, as it was when it was last persisted
    versions: tuple[str, ...] = ()  # of it that were persisted under a name


@dataclass(eq=False)
class Session:
    """One agent's context. Only the engine thread touches one."""

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
    leaf: Block | None = None  # where its keys and values end; they may have been evicted
    turn: int | None = None  # the sequence that goes on with it
    latest: tuple[int, int] = (0, 0)  # the sequence of the latest turn that ended, and where its output begins
    num_kept: int = 0  # tokens whose keys and values there were after the latest turn, here or in a tier
    fingerprint: bytes = b""  # of what these were computed with
    tokenizer: ChatTokenizer | None = None  # what its tokens mean; None until it is used in this process
    # On disk:
    durable: tuple[int, int] | None = None  # how many of its tokens are there, and how many with keys and values
    saved_log: tuple[int, ...] | None = None  # the log that is there; None if that is not in memory
    num_saving: int = 0  # times that it is on its way there
    on_disk_only: bool = False  # whether its tokens are there and not in memory
    on_disk_version: str = ""  # the version in which they are there, if the session itself is not
    unverified: SessionRecord | None = None  # what was read, until its model's tokenizer has been compared with it
    keys: tuple[bytes, ...] = ()  # of the blocks that it had there, until its next turn
    versions: frozenset[str] = frozenset()

    @property
    def known(self) -> bool:
        """Whether a turn of it has ended."""
        return bool(self.log) or self.on_disk_only

    @property
    def persisted(self) -> bool:
        """Whether something of it is on disk, or on its way there."""
        return self.durable is not None or bool(self.versions) or self.num_saving > 0

    @property
    def info(self) -> SessionInfo:
        """A snapshot."""
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


class SessionStore:
    """All sessions of all tenants."""

    def __init__(self, pool: BlockPool, clock: Callable[[], float], max_sessions: int, ttl_s: float) -> None:
        self.pool, self.clock, self.max_sessions, self.ttl_s = pool, clock, max_sessions, ttl_s
        self.sessions: dict[str, Session] = {}
        # Read by other threads: an entry is replaced, never changed.
        self.infos: dict[str, SessionInfo] = {}
        self._names: dict[tuple[str, str], str] = {}

    def get(self, tenant: str, session: str) -> Session:
        """The session of that handle or name.

        Raises:
            UnknownSession: the tenant has none, or has it no more.
        """
        found = self.sessions.get(self._names.get((tenant, session), session))
        if found is None or found.tenant != tenant:
            raise UnknownSession(session)
        return found

    def owner(self, tenant: str, name: str) -> str | None:
        """The handle of the session that has a name; None if none has."""
        return self._names.get((tenant, name))

    def open(
        self, tenant: str, model: str, options: SessionOptions, tools: tuple[dict[str, Any], ...], turn: int
    ) -> Session:
        """A session without tokens, to which `turn` brings the first.

        Raises:
            InvalidRequest: the name cannot be one, or is taken.
            CapacityError: there are as many sessions as there may be.
        """
        self._check(tenant, [options.name] if options.name else [], 1)
        ttl_s = self.ttl_s if options.ttl_s is None else options.ttl_s
        session = Session(handle(), tenant, model, options, ttl_s, self.clock(), "user", tools, turn=turn)
        self._add(session)
        return session

    def fork(
        self, session: Session, count: int, names: tuple[str, ...], at: SessionRecord | None = None
    ) -> list[Session]:
        """`count` sessions that go on from where the parent's latest finished turn ended, or from what was read of it.

        Copies no tokens, keys or values, so the cost does not grow with the context. They keep as the parent is kept,
        but are not pinned.

        Raises:
            InvalidRequest: there is nothing to go on from, or a name cannot be one, or is taken.
            SessionBusy: the parent's first turn has not ended.
            CapacityError: there are as many sessions as there may be.
        """
        assert at is not None or not session.on_disk_only, "a fork of a session whose tokens are not here"
        if not session.log and at is None:
            raise SessionBusy(session.session_id, first=True)
        if not 1 <= count <= MAX_FORKS:
            raise InvalidRequest(f"count is {count}; it must be from 1 to {MAX_FORKS}.")
        if names and len(names) != count:
            raise InvalidRequest(f"There are {len(names)} names for {count} forks; give one for each, or none.")
        self._check(session.tenant, names, count)
        self.use(session)
        children = []
        for i in range(count):
            options = SessionOptions(names[i] if names else "", session.options.ttl_s, False, session.options.ephemeral)
            child = Session(
                handle(),
                session.tenant,
                session.model,
                options,
                session.ttl_s,
                session.used_at,
                session.after,
                session.tools,
                session.session_id,
                session.log,
                num_kept=session.num_kept,
                fingerprint=session.fingerprint,
                tokenizer=session.tokenizer,
                unverified=session.unverified,
                keys=session.keys,
            )
            if at is None:
                self._go_on(child, session.leaf)
            else:
                child.after, child.tools = at.after, at.tools
                recall(child, at)
            self._add(child)
            children.append(child)
        return children

    def begin(self, session: Session, turn: int) -> None:
        """Note that a turn goes on with the session."""
        assert session.turn in (None, turn), "two turns at once"
        session.turn = turn
        self.use(session)

    def finish(self, session: Session, log: tuple[int, ...], leaf: Block | None, after: str) -> None:
        """Take what a turn has come to; `leaf` is where its keys and values are, as far as they are there."""
        session.turn, session.log, session.after = None, log, after
        session.num_kept, session.keys = 0 if leaf is None else leaf.end, ()
        self._go_on(session, leaf)
        self.use(session)

    def shorten(self, session: Session, num_tokens: int) -> None:
        """Have it go on after its first tokens only."""
        leaf = session.leaf
        while leaf is not None and leaf.end > num_tokens:
            leaf = leaf.parent
        if leaf is not None and leaf.parent is None:
            leaf = None
        self.finish(session, session.log[:num_tokens], leaf, session.after)

    def abandon(self, session: Session) -> None:
        """End a turn that came to nothing: the session is as it was, and gone if that was its first."""
        session.turn = None
        if session.known:
            self.use(session)
        else:
            self.close(session)

    # Sessions that are kept on disk

    def adopt(self, head: SessionHead) -> Session:
        """Know a session that rests on disk; its time begins anew.

        A name that another session has by now is not taken again.
        """
        taken = (head.tenant, head.name) in self._names
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
        """Know all sessions that rest on disk, with their versions."""
        for head in sorted(heads, key=lambda head: head.version):  # sessions before their versions
            session = self.sessions.get(head.session_id)
            if session is None:
                session = self.adopt(head)
            if head.version:
                session.versions |= {head.version}
                self.note(session)

    def note_removed(self, session: Session, left: list[SessionHead]) -> None:
        """Note that nothing else is on disk of it any more than these."""
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
        """Whether it was not closed; another one may have come with its handle since."""
        return self.sessions.get(session.session_id) is session

    def load(self, session: Session, record: SessionRecord) -> None:
        """Have its tokens here again."""
        recall(session, record)
        session.on_disk_only, session.saved_log = False, record.tokens
        self.use(session)

    def note_saved(self, session: Session, record: SessionRecord) -> None:
        """Note that this is on disk now."""
        if record.version:
            session.versions |= {record.version}
        session.durable, session.saved_log = (len(record.tokens), record.num_kept), record.tokens
        session.ttl_s = self.ttl_s if record.ttl_s is None else record.ttl_s
        self.note(session)

    def note(self, session: Session) -> None:
        """Let others see what has changed of it."""
        self.infos[session.session_id] = session.info

    def use(self, session: Session) -> None:
        """Count a use: its time begins anew."""
        session.used_at = self.clock()
        self.note(session)

    def close(self, session: Session) -> None:
        """Let go of a session; its turns are for the caller to end."""
        del self.sessions[session.session_id], self.infos[session.session_id]
        self._names.pop((session.tenant, session.options.name), None)
        self._go_on(session, None)

    def expired(self) -> list[Session]:
        """The sessions whose time has come."""
        now = self.clock()
        return [s for s in self.sessions.values() if s.turn is None and now - s.used_at > s.ttl_s]

    @property
    def references(self) -> list[Block]:
        """The blocks that pinned sessions keep, each as often as they do."""
        return [s.leaf for s in self.sessions.values() if s.leaf is not None and s.options.pinned]

    def check_integrity(self) -> None:
        """Prove that every session's block ends where its tokens say, and that blocks count their sessions right."""
        held: dict[Block, int] = {}
        for session in self.sessions.values():
            leaf = session.leaf
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
        assert self._names == named, "the names are not the sessions'"

    def _add(self, session: Session) -> None:
        self.sessions[session.session_id] = session
        if session.options.name:
            self._names[session.tenant, session.options.name] = session.session_id
        self.infos[session.session_id] = session.info

    def _go_on(self, session: Session, leaf: Block | None) -> None:
        """Move a session's hold, and its pin, to another block."""
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

    def _check(self, tenant: str, names: tuple[str, ...] | list[str], count: int) -> None:
        for name in names:
            if not NAME.fullmatch(name):
                raise InvalidRequest(
                    f"{name[:80]!r} cannot be a session's name: 1 to 64 letters, digits, dots, dashes and underscores."
                )
            if name.startswith("s_"):
                raise InvalidRequest(f"{name[:80]!r} cannot be a session's name: handles begin with s_.")
            if names.count(name) > 1:
                raise InvalidRequest(f"`names` has a fork named {name!r} already: give each a name of its own.")
            if (tenant, name) in self._names:
                raise InvalidRequest(f"There is a session named {name!r} already; close it, or take another name.")
        if len(self.sessions) + count > self.max_sessions:
            raise CapacityError(
                f"There are {len(self.sessions)} sessions, and may be {self.max_sessions}: close some (list_sessions "
                "shows them).",
                60,
            )


def recall(session: Session, record: SessionRecord) -> None:
    """Have a session be what was read."""
    session.log, session.num_kept, session.keys = record.tokens, record.num_kept, record.blocks
    session.fingerprint, session.unverified = record.fingerprint, record


def handle() -> str:
    """A name that nobody can guess."""
    return "s_" + secrets.token_hex(HANDLE_BITS // 8)
