"""What of a session is kept on disk, and what a store of such things offers. Knows no files."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from typing import Any, Protocol

from mlx_mcp.core.ports import BlockTier, StoredBlock


@dataclass(frozen=True)
class SessionHead:
    """A durable session, or a named version of one, without what grows with its context."""

    session_id: str
    tenant: str
    model: str
    name: str
    version: str  # "" is the session itself, anything else a snapshot of that name
    fingerprint: bytes  # of all that its keys and values depend on
    tokenizer: bytes  # a digest of what its tokens mean
    num_tokens: int
    num_kept: int  # tokens whose keys and values it had
    after: str  # see SessionInfo
    tools: tuple[dict[str, Any], ...]
    parent_id: str
    ttl_s: float
    pinned: bool
    saved_at: float  # wall clock, seconds
    used_at: float  # wall clock, seconds


@dataclass(frozen=True)
class SessionRecord(SessionHead):
    """All that is needed to go on with a session."""

    tokens: tuple[int, ...]
    text: str  # the same as text, for a tokenizer that counts otherwise
    blocks: tuple[bytes, ...]  # the keys of its blocks, the first first; those that could be kept

    @property
    def head(self) -> SessionHead:
        """Without what grows."""
        return SessionHead(**{field.name: getattr(self, field.name) for field in fields(SessionHead)})


class OffloadTier(BlockTier, Protocol):
    """A tier that takes what nobody asked to be kept."""

    def put(self, blocks: Seq[StoredBlock], *, offload: bool = False) -> int:
        """See BlockTier.put; of blocks to `offload` it takes what quota and daily budget allow."""


class SessionLog(Protocol):
    """The sessions of a store."""

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

    def close(self) -> None:
        """Let the folder go."""
