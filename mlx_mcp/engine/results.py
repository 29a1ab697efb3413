"""Results of the thread that reads and writes: frozen values, which the engine takes as commands.

An `outcome` is what was asked for, or the error in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_mcp.core.durable import SessionHead, SessionRecord, Store
from mlx_mcp.core.layout import Payload
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.core.session import SessionInfo
from mlx_mcp.errors import MlxMcpError


@dataclass(frozen=True)
class StoreOpened:
    """The store was opened; these sessions are in it."""

    outcome: Store | MlxMcpError = field(repr=False, compare=False)
    heads: tuple[SessionHead, ...] = ()


@dataclass(frozen=True)
class SessionRead:
    """A session was read; None if that version of it is not there or damaged."""

    session_id: str
    version: str
    outcome: SessionRecord | MlxMcpError | None


@dataclass(frozen=True)
class VersionRead:
    """The version of a session that a call forks was read; None if it is not there or damaged."""

    call_id: int
    outcome: SessionRecord | MlxMcpError | None


@dataclass(frozen=True)
class SessionWritten:
    """A session was written: the record that would survive a power cut now, and the bytes of blocks written for it."""

    number: int
    outcome: tuple[SessionRecord, int] | MlxMcpError


@dataclass(frozen=True)
class SessionsRemoved:
    """The sessions that a call has closed were removed from disk."""

    call_id: int
    closed: tuple[SessionInfo, ...]
    outcome: MlxMcpError | None


@dataclass(frozen=True)
class RestoredBlock:
    """A block from the store, and what makes it a payload on the engine thread."""

    block: StoredBlock
    payload: Callable[[], Payload] = field(repr=False, compare=False)


@dataclass(frozen=True)
class BlocksRead:
    """Blocks were read, up to the first that is not there or is damaged."""

    number: int
    outcome: tuple[RestoredBlock, ...] | MlxMcpError


@dataclass(frozen=True)
class BlocksWritten:
    """Evicted blocks were written: the bytes written, 0 if the day's budget is spent."""

    num_blocks: int
    num_bytes: int  # that these take
    outcome: int | MlxMcpError


@dataclass(frozen=True)
class FilesRead:
    """What a user asked about sessions on disk was read; or an export was written, with its size in bytes."""

    call_id: int
    outcome: object


@dataclass(frozen=True)
class RemovalFound:
    """The heads of a session that is to be removed."""

    call_id: int
    outcome: list[SessionHead] | MlxMcpError


@dataclass(frozen=True)
class RemovalDone:
    """Versions of a session were removed: how many, and the heads that are left."""

    call_id: int
    session_id: str
    outcome: tuple[int, list[SessionHead]] | MlxMcpError


@dataclass(frozen=True)
class PurgeFound:
    """The heads of all sessions before the store is purged."""

    call_id: int
    outcome: list[SessionHead] | MlxMcpError


@dataclass(frozen=True)
class PurgeDone:
    """The store was purged."""

    call_id: int
    outcome: MlxMcpError | None


@dataclass(frozen=True)
class ImportFound:
    """The file of an import was read: the session in it."""

    call_id: int
    outcome: SessionRecord | MlxMcpError


@dataclass(frozen=True)
class ImportDone:
    """An import was written or failed; the heads of its session that are on disk now."""

    call_id: int
    outcome: tuple[SessionHead | MlxMcpError, list[SessionHead]] | MlxMcpError


FileResult = FilesRead | RemovalFound | RemovalDone | PurgeFound | PurgeDone | ImportFound | ImportDone
ThreadResult = (
    StoreOpened | SessionRead | VersionRead | SessionWritten | SessionsRemoved | BlocksRead | BlocksWritten | FileResult
)
