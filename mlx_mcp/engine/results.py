"""What comes back from the thread that reads and writes: frozen values, which the engine takes as commands.

An `outcome` is what was asked for, or the error that came in its place.
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
    """The store, and the sessions in it."""

    outcome: Store | MlxMcpError = field(repr=False, compare=False)
    heads: tuple[SessionHead, ...] = ()


@dataclass(frozen=True)
class SessionRead:
    """A session, or None if that version of it is not there or damaged."""

    session_id: str
    version: str
    outcome: SessionRecord | MlxMcpError | None


@dataclass(frozen=True)
class VersionRead:
    """The version of a session that a call forks; None if it is not there or damaged."""

    call_id: int
    outcome: SessionRecord | MlxMcpError | None


@dataclass(frozen=True)
class SessionWritten:
    """The latest record of a session that would survive a power cut now, and the bytes of blocks written for it."""

    number: int
    outcome: tuple[SessionRecord, int] | MlxMcpError


@dataclass(frozen=True)
class SessionsRemoved:
    """Nothing is on disk any more of the sessions that a call has closed."""

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
    """Blocks, up to the first that is not there or not sound."""

    number: int
    outcome: tuple[RestoredBlock, ...] | MlxMcpError


@dataclass(frozen=True)
class BlocksWritten:
    """The bytes that were written of so many evicted blocks; 0 if the day's budget is spent."""

    num_blocks: int
    num_bytes: int  # that these take
    outcome: int | MlxMcpError


@dataclass(frozen=True)
class FilesRead:
    """What a user asked to know of sessions on disk, or the bytes that an export has written."""

    call_id: int
    outcome: object


@dataclass(frozen=True)
class RemovalFound:
    """What is on disk of a session that is to be removed."""

    call_id: int
    outcome: list[SessionHead] | MlxMcpError


@dataclass(frozen=True)
class RemovalDone:
    """How many versions of a session were removed, and what is left of it."""

    call_id: int
    session_id: str
    outcome: tuple[int, list[SessionHead]] | MlxMcpError


@dataclass(frozen=True)
class PurgeFound:
    """All that is on disk before it is purged."""

    call_id: int
    outcome: list[SessionHead] | MlxMcpError


@dataclass(frozen=True)
class PurgeDone:
    """Nothing is on disk any more."""

    call_id: int
    outcome: MlxMcpError | None


@dataclass(frozen=True)
class ImportFound:
    """The session in a file, all of which was read."""

    call_id: int
    outcome: SessionRecord | MlxMcpError


@dataclass(frozen=True)
class ImportDone:
    """What came of an import, and what is on disk of its session now."""

    call_id: int
    outcome: tuple[SessionHead | MlxMcpError, list[SessionHead]] | MlxMcpError


FileResult = FilesRead | RemovalFound | RemovalDone | PurgeFound | PurgeDone | ImportFound | ImportDone
ThreadResult = (
    StoreOpened | SessionRead | VersionRead | SessionWritten | SessionsRemoved | BlocksRead | BlocksWritten | FileResult
)
