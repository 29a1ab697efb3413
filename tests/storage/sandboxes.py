"""Sandboxes on disk for tests: what a record has follows from its name and turn."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_mcp.core.durable_sandbox import SandboxRecord
from mlx_mcp.storage.folder import Calls
from mlx_mcp.storage.sandbox_log import SandboxLog
from tests.storage.world import T0

QUOTA_BYTES = 1 << 20


def sandbox(sandbox_id: str, turn: int = 0, **changes: Any) -> SandboxRecord:
    """The sandbox of that handle after so many runs."""
    said = f"{sandbox_id} {turn}".encode()
    made = SandboxRecord(
        sandbox_id=sandbox_id,
        tenant="ann",
        name="",
        version="",
        model="",
        runtime="scripted 1",
        parent_id="",
        persisted=True,
        ttl_s=1000.0,
        saved_at=T0,
        used_at=T0,
        variables={"table": f"dict of {turn}"},
        remembered={"a": "s_1"},
        can_replay=True,
        dump=hashlib.shake_128(said).digest(300 + turn),
        journal=hashlib.shake_128(b"journal" + said).digest(200),
    )
    return replace(made, **changes)


def open_log(path: Path, quota_bytes: int = QUOTA_BYTES, calls: Calls | None = None) -> SandboxLog:
    """The log of a folder, which no process has open."""
    return SandboxLog.open(path, quota_bytes=quota_bytes, calls=calls)


def records_in(log: SandboxLog) -> dict[tuple[str, str], SandboxRecord | None]:
    """Everything in a log, read whole."""
    return {(head.sandbox_id, head.version): log.load(head.sandbox_id, head.version) for head in log.heads()}
