"""What of a session is kept on disk, and what a store of such things offers. Knows no files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_mcp.core.ports import BlockTier, StoredBlock
from mlx_mcp.errors import InvalidRequest, NotOnDisk, StorageError


@dataclass(frozen=True, kw_only=True)
class SessionFacts:
    """What is known of a session on disk, whether its tokens were read or not."""

    session_id: str
    tenant: str
    model: str
    name: str
    version: str  # a snapshot's name; "" is the current one
    fingerprint: bytes  # of all that its keys and values depend on
    tokenizer: bytes  # a digest
    num_kept: int  # so many of the tokens have their keys and values in the blocks
    after: str
    tools: tuple[dict[str, Any], ...]
    parent_id: str
    ttl_s: float | None  # None: it never ends by itself
    pinned: bool
    ephemeral: bool
    saved_at: float  # by the wall clock, seconds
    used_at: float


@dataclass(frozen=True, kw_only=True)
class SessionRecord(SessionFacts):
    """A session as it is kept: all that is needed to go on with it, or to compute it again."""

    text: str  # the transcript, for people
    tokens: tuple[int, ...]
    blocks: tuple[bytes, ...]  # keys, in order, with the tail

    @property
    def num_tokens(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class SessionHead(SessionFacts):
    """What is known of a durable session without reading its tokens."""

    num_tokens: int
    stored_bytes: int  # of its own file; its blocks may be shared


def shown(head: SessionHead | SessionRecord) -> dict[str, Any]:
    """What a user is told of a session on disk, as JSON has it; times in seconds since 1970."""
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


def said_of_old(num_old: int) -> str:
    """What a user is told of sessions in an earlier version's form."""
    return (
        f"{num_old} durable sessions in the cache folder are in an earlier version's form (files *.session), which "
        "this version does not read. Go on with them in that version, or delete these files and begin new sessions."
    )


def transcript(record: SessionRecord) -> str:
    """What was said, with the model's own marks."""
    parts: list[Any] = json.loads(record.text or "[]")
    return "".join(part if isinstance(part, str) else part[0] for part in parts)


def find_heads(heads: Iterable[SessionHead], session: str, version: str | None = None) -> list[SessionHead]:
    """The heads of one session by its handle or name, whoever's it is: of all versions, or of one.

    Raises:
        NotOnDisk: there is none.
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
    """See that a session that is to be imported may have its name, which the session `owner_id` has.

    Raises:
        InvalidRequest: that is another session.
    """
    if owner_id != record.session_id:
        raise InvalidRequest(
            f"Another session is named {record.name!r} already: {owner_id}. Import it under another name (--name), or "
            "remove that one first."
        )


class Transfer:
    """A session on its way to a file or out of one: how far it is, and whether anybody still wants it.

    The thread that reads and writes says how far it is; any thread may read that, and call `stop`.
    """

    def __init__(self, fd: int, file_name: str = "") -> None:
        """Own a descriptor: of the folder in which a file of that name is to be written, or of the file to read."""
        self.fd, self.file_name = fd, file_name
        self.done_bytes = self.total_bytes = 0
        self.stopped = False
        self.between: Callable[[], None] = lambda: None  # called after each part, on the thread that transfers

    def __del__(self) -> None:
        os.close(self.fd)

    def stop(self) -> None:
        """Have it end before its next part; nothing of it is left then."""
        self.stopped = True

    def went_on(self, num_bytes: int) -> None:
        """Note that so many bytes more are done.

        Raises:
            StorageError: nobody wants the rest any more.
        """
        self.done_bytes += num_bytes
        self.between()
        if self.stopped:
            raise StorageError("The transfer was stopped. Nothing of it was kept.")


class OffloadTier(BlockTier, Protocol):
    """A tier that takes what nobody asked to be kept."""

    def put(self, blocks: Seq[StoredBlock], *, offload: bool = False) -> int:
        """See BlockTier.put; of blocks to `offload` it takes what quota and daily budget allow."""


class SessionLog(Protocol):
    """The sessions of a store."""

    num_old: int  # files of sessions in an earlier version's form, which is not read

    def heads(self) -> list[SessionHead]:
        """Every durable session and version."""

    def load(self, session_id: str, version: str = "") -> SessionRecord | None:
        """One of them; None if it is not there, or not sound."""


class Store(Protocol):
    """A tier that outlives the process, with the sessions that refer to its blocks.

    One thread calls it, but for `tier.find`, which any may. What a call has not refused is durable when it returns.
    """

    @property
    def tier(self) -> OffloadTier:
        """The blocks."""

    @property
    def sessions(self) -> SessionLog:
        """The sessions."""

    def persist(self, blocks: Seq[StoredBlock], record: SessionRecord) -> int:
        """Keep a session, and those of its blocks that are not there yet; returns the bytes written of these.

        Raises:
            StorageError: it cannot be kept now; what was kept before still is.
        """

    def remove(self, session_id: str, version: str | None = None) -> int:
        """Forget a version of a session, or all of it, with the blocks that no other refers to; returns the versions.

        Raises:
            StorageError: it cannot be removed now.
        """

    def purge(self) -> None:
        """Forget all sessions and all blocks.

        Raises:
            StorageError: some are there still.
        """

    def export(self, session_id: str, version: str, transfer: Transfer) -> int:
        """Write a session with its blocks to a file in a folder; returns its bytes.

        Raises:
            StorageError: there is no such session, or it cannot be written now; then there is no such file.
        """

    def look_into(self, transfer: Transfer) -> SessionRecord:
        """Read all of an exported file, which is whole if this returns; the session in it.

        Raises:
            StorageError: it is not whole, or cannot be read.
        """

    def import_(self, transfer: Transfer, name: str = "") -> SessionHead:
        """Keep what was exported, in place of a session of the same handle and version, under another name if given.

        Raises:
            InvalidRequest: another session has the name.
            StorageError: it is not whole, or cannot be kept now.
        """

    def close(self) -> None:
        """Let the folder go."""
