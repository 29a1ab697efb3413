"""What of a session is kept on disk, and what a store of such things offers. Knows no files."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_mcp.core.ports import BlockTier, StoredBlock


@dataclass(frozen=True)
class SessionRecord:
    """A session as it is kept: all that is needed to go on with it, or to compute it again."""

    session_id: str
    tenant: str
    model: str
    name: str
    version: str  # a snapshot's name; "" is the current one
    fingerprint: bytes  # of all that its keys and values depend on
    tokenizer: bytes  # a digest
    text: str  # the transcript, for when the tokenizer has changed
    tokens: tuple[int, ...]
    num_kept: int  # so many of the tokens have their keys and values in the blocks
    after: str
    tools: tuple[dict[str, Any], ...]
    parent_id: str
    ttl_s: float | None  # None: it never ends by itself
    pinned: bool
    ephemeral: bool
    saved_at: float  # by the wall clock, seconds
    used_at: float
    blocks: tuple[bytes, ...]  # keys, in order, with the tail


@dataclass(frozen=True)
class SessionHead:
    """What is known of a durable session without reading its tokens."""

    session_id: str
    tenant: str
    model: str
    name: str
    version: str
    fingerprint: bytes
    tokenizer: bytes
    num_tokens: int
    num_kept: int
    after: str
    tools: tuple[dict[str, Any], ...]
    parent_id: str
    ttl_s: float | None
    pinned: bool
    ephemeral: bool
    saved_at: float
    used_at: float
    stored_bytes: int  # of its own file; its blocks may be shared


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
