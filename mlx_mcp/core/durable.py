"""What a session on disk consists of, and what a store of sessions offers. Knows no files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_mcp.core.origin import Origin
from mlx_mcp.core.ports import BlockTier, StoredBlock
from mlx_mcp.errors import InvalidRequest, NotOnDisk, StorageError


@dataclass(frozen=True, kw_only=True)
class SessionFacts:
    """The properties of a session on disk that can be read without its tokens."""

    session_id: str
    tenant: str
    model: str
    name: str
    version: str  # a snapshot's name; "" is the current one
    fingerprint: bytes  # of all that its keys and values depend on
    tokenizer: bytes  # its digest
    num_kept: int  # the number of the first tokens whose keys and values are in the blocks
    after: str  # the role whose message the tokens end in
    tools: tuple[dict[str, Any], ...]
    parent_id: str
    ttl_s: float | None  # None: it never ends by itself
    pinned: bool
    ephemeral: bool
    saved_at: float  # by the wall clock, seconds
    used_at: float


@dataclass(frozen=True, kw_only=True)
class SessionRecord(SessionFacts):
    """A session as it is stored: all that is needed to continue it, or to compute it again."""

    text: str  # the transcript, for people
    tokens: tuple[int, ...]
    blocks: tuple[bytes, ...]  # keys, in order, with the tail
    origins: tuple[Origin, ...] = ()  # of its latest turns; none in a file of a version that did not keep them

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class SessionHead(SessionFacts):
    """A session on disk whose tokens were not read."""

    num_tokens: int
    stored_bytes: int  # of its own file; its blocks may be shared


def session_as_json(head: SessionHead | SessionRecord) -> dict[str, Any]:
    """A session on disk as JSON, for a user. Times are in seconds since 1970."""
    return {
        "session": head.session_id,
        "name": head.name,
        "version": head.version,
        "model": head.model,
        "tokens": head.num_tokens,
        "kept_tokens": head.num_kept,
        "pinned": head.pinned,
        "parent": head.parent_id,
        "saved_at": head.saved_at,
        "used_at": head.used_at,
    }


def old_sessions_warning(num_old: int) -> str:
    """The warning about sessions in the form of an earlier version."""
    return (
        f"{num_old} durable sessions in the cache folder are in an earlier version's form (files *.session), which "
        "this version does not read. Go on with them in that version, or delete these files and begin new sessions."
    )


def session_with_text(record: SessionRecord) -> dict[str, Any]:
    """A session on disk as JSON, with its text, control tokens included, and its turns.

    The `begin` of a turn is the number of characters of the text before it.
    """
    parts: list[Any] = json.loads(record.text or "[]")
    origins = {origin.begin: origin for origin in record.origins}
    text, turns = "", []
    for part in parts:
        if not isinstance(part, str) and len(part) > 1 and part[1] in origins:
            origin = origins[part[1]]
            turns.append({"who": origin.who, "at": origin.at, "begin": len(text)})
        text += part if isinstance(part, str) else part[0]
    return session_as_json(record) | {"text": text, "turns": turns}


def find_heads(heads: Iterable[SessionHead], session: str, version: str | None = None) -> list[SessionHead]:
    """Find the heads of one session, of any tenant, by its handle or name: of all versions, or of one.

    Raises:
        NotOnDisk: there is no such session, or no such version.
        InvalidRequest: several sessions have that name.
    """
    named = [head for head in heads if session in (head.session_id, head.name)]
    found = [head for head in named if version in (None, head.version)]
    if not found:
        raise NotOnDisk(session, version or "", tuple(sorted(head.version for head in named)))
    handles = sorted({head.session_id for head in found})
    if len(handles) > 1:
        raise InvalidRequest(f"{len(handles)} sessions are named {session[:80]!r}: give one of {', '.join(handles)}.")
    return found


def check_name(record: SessionRecord, owner_id: str) -> None:
    """Check that a session that is imported may have its name, which the session `owner_id` has.

    Raises:
        InvalidRequest: `owner_id` is another session.
    """
    if owner_id != record.session_id:
        raise InvalidRequest(
            f"Another session is named {record.name!r} already: {owner_id}. Import it under another name (--name), or "
            "remove that one first."
        )


class Transfer:
    """The progress of an export or import, and whether anybody still waits for it.

    The thread that reads and writes notes the progress. Any thread may read it, and call `stop`.
    """

    def __init__(self, fd: int, file_name: str = "") -> None:
        """Take over a descriptor: of the folder in which a file of that name is written, or of the file to read."""
        self.fd, self.file_name = fd, file_name
        self.done_bytes = self.total_bytes = 0
        self.stopped = False
        self.between: Callable[[], None] = lambda: None  # called after each part, on the thread that transfers

    def __del__(self) -> None:
        os.close(self.fd)

    def stop(self) -> None:
        """Have the transfer end before its next part. Nothing is left of it then."""
        self.stopped = True

    def advance(self, num_bytes: int) -> None:
        """Note that this many more bytes were transferred.

        Raises:
            StorageError: the transfer was stopped.
        """
        self.done_bytes += num_bytes
        self.between()
        if self.stopped:
            raise StorageError("The transfer was stopped, and nothing of it was kept. Run the command again.")


class OffloadTier(BlockTier, Protocol):
    """A tier that also takes blocks that no session asked it to keep. Any thread may read its counts."""

    @property
    def nbytes(self) -> int:
        """What it takes."""

    @property
    def num_evicted(self) -> int:
        """Blocks that its quota has removed since it was opened."""

    def put(self, blocks: Seq[StoredBlock], *, offload: bool = False) -> int:
        """See BlockTier.put. If `offload` is set, it takes only what the quota and the daily budget allow."""


class SessionLog(Protocol):
    """The sessions of a store."""

    num_old: int  # files of sessions in an earlier version's form, which is not read

    def heads(self) -> list[SessionHead]:
        """The heads of every session and version."""

    def load(self, session_id: str, version: str = "") -> SessionRecord | None:
        """Read a version of a session; returns None if it is not there, or is damaged."""


class Store(Protocol):
    """A tier that outlives the process, with the sessions that refer to its blocks.

    One thread calls it; only `tier.find` and the counts of `tier` may be used from any thread. When a call returns,
    what it did is durable.
    """

    @property
    def tier(self) -> OffloadTier:
        """The blocks."""

    @property
    def sessions(self) -> SessionLog:
        """The sessions."""

    def persist(self, blocks: Seq[StoredBlock], record: SessionRecord) -> int:
        """Store a session, and those of its blocks that are not there yet; returns the bytes of blocks written.

        Raises:
            StorageError: it cannot be stored now; what was stored before is still there.
        """

    def remove(self, session_id: str, version: str | None = None) -> int:
        """Remove one version of a session or all, and the blocks that no other needs; returns how many were removed.

        Raises:
            StorageError: it cannot be removed now.
        """

    def purge(self) -> None:
        """Remove all sessions and all blocks.

        Raises:
            StorageError: some are still there.
        """

    def export(self, session_id: str, version: str, transfer: Transfer) -> int:
        """Write a session with its blocks to a file in a folder; returns the size of the file in bytes.

        Raises:
            StorageError: there is no such session, or it cannot be written now. No file is left.
        """

    def verify_export(self, transfer: Transfer) -> SessionRecord:
        """Read all of an exported file, and return the session in it. The file is whole if this returns.

        Raises:
            StorageError: the file is not whole, or cannot be read.
        """

    def import_(self, transfer: Transfer, name: str = "") -> SessionHead:
        """Store an exported session, in place of one of the same handle and version; a `name` renames it.

        Raises:
            InvalidRequest: another session has the name.
            StorageError: the file is not whole, or the session cannot be stored now.
        """

    def close(self) -> None:
        """Close the folder, so that another process can open it."""
