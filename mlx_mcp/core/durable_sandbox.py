"""What a sandbox on disk consists of, and what a log of sandboxes offers. Knows no files, and no interpreter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_mcp.errors import InvalidRequest, NotOnDisk, StorageError


@dataclass(frozen=True, kw_only=True)
class SandboxFacts:
    """The properties of a sandbox on disk that can be read without its state."""

    sandbox_id: str
    tenant: str
    name: str
    version: str  # a snapshot's name; "" is the current one
    model: str  # which its programs ask; "" for the server's default
    runtime: str  # the version of the interpreter that can load its dump
    parent_id: str
    persisted: bool  # a caller asked for it; else it was saved because it had changed
    ttl_s: float
    saved_at: float  # by the wall clock, seconds
    used_at: float
    variables: dict[str, str]  # name → type and size in a line
    remembered: dict[str, str]  # what its programs call a text that was read → the handle of its session
    can_replay: bool  # the journal is whole, so that another interpreter can rebuild the state


@dataclass(frozen=True, kw_only=True)
class SandboxRecord(SandboxFacts):
    """A sandbox as it is stored: all that is needed to go on with it."""

    dump: bytes  # all variables, as its interpreter writes them
    journal: bytes  # its runs with the answers that they got


@dataclass(frozen=True, kw_only=True)
class SandboxHead(SandboxFacts):
    """A sandbox on disk whose state was not read."""

    stored_bytes: int


class SandboxLog(Protocol):
    """The sandboxes of a folder. One thread calls it. When a call returns, what it did is durable."""

    def heads(self) -> list[SandboxHead]:
        """The heads of every sandbox and version."""

    def save(self, record: SandboxRecord) -> None:
        """Store a sandbox, in place of the same version of it.

        Raises:
            StorageError: it cannot be stored now; what was stored before is still there.
        """

    def load(self, sandbox_id: str, version: str = "") -> SandboxRecord | None:
        """Read a sandbox; returns None if it is not there.

        Raises:
            StorageError: it is damaged, or cannot be read.
        """

    def is_damaged(self, tenant: str, sandbox_id: str) -> bool:
        """Whether a file of that sandbox was found damaged and set aside. Any thread may call it."""

    def remove(self, sandbox_id: str, version: str | None = None) -> int:
        """Remove a sandbox, or one version of it; returns how many versions were removed.

        Raises:
            StorageError: some are still there, or may be after a power cut.
        """

    def clear(self) -> None:
        """Remove all sandboxes, damaged ones too.

        Raises:
            StorageError: some are still there.
        """

    def expire(self, now: float) -> list[SandboxHead]:
        """Remove what was not used for longer than its TTL, by the wall clock, and return its heads.

        Raises:
            StorageError: some of it is still there.
        """

    def close(self) -> None:
        """Close the folder, so that another process can open it."""


def damaged(sandbox: str) -> StorageError:
    """The error for a sandbox whose file is not what was written."""
    return StorageError(
        f"What was kept of sandbox {sandbox[:80]!r} on disk is damaged, so its variables are lost. Begin a new one "
        "(sandbox_run), or fork a version of it (list_sessions shows them)."
    )


def sandbox_as_json(head: SandboxFacts) -> dict[str, Any]:
    """A sandbox on disk as JSON, for a user. Times are in seconds since 1970."""
    return {
        "sandbox": head.sandbox_id,
        "name": head.name,
        "version": head.version,
        "persisted": head.persisted,
        "variables": head.variables,
        "remembered": head.remembered,
        "parent": head.parent_id,
        "saved_at": head.saved_at,
        "used_at": head.used_at,
        "runtime": head.runtime,
    }


def versions_of(heads: Iterable[SandboxHead], sandbox: str, version: str | None = None) -> list[SandboxHead]:
    """Find the heads of one sandbox, of any tenant, by its handle or name: of all versions, or of one.

    Raises:
        NotOnDisk: there is no such sandbox, or no such version.
        InvalidRequest: several sandboxes have that name.
    """
    named = [head for head in heads if sandbox in (head.sandbox_id, head.name)]
    found = [head for head in named if version in (None, head.version)]
    if not found:
        raise NotOnDisk(sandbox, version or "", tuple(sorted(head.version for head in named)), kind="sandbox")
    handles = sorted({head.sandbox_id for head in found})
    if len(handles) > 1:
        raise InvalidRequest(f"{len(handles)} sandboxes are named {sandbox[:80]!r}: give one of {', '.join(handles)}.")
    return found


def find_sandbox(heads: Iterable[SandboxHead], sandbox: str, version: str = "") -> SandboxHead:
    """Find one version of a sandbox; see `versions_of`."""
    return versions_of(heads, sandbox, version)[0]
