"""Named points at which a test ends or breaks the process. Without MLX_MCP_TEST_MODE=1 they do nothing.

`MLX_MCP_FAULT=write.renamed:kill@3` kills the process the third time it comes by that point.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

POINTS = (
    "write.opened",
    "write.half_written",
    "write.written",
    "write.synced",
    "write.renamed",
    "write.durable",
    "write.indexed",
    "unlink.some",
    "unlink.all",
    "rename.done",
    "delete.rewritten",
    "evict.some",
    "persist.blocks_durable",
    "persist.manifest_durable",
    "remove.marked",
    "remove.blocks_deleted",
    "open.locked",
    "open.scanned",
    "open.collected",
)


class Fault(Exception):
    """What the action `raise` raises: no error that anything in this package expects."""


class _Armed:
    """One fault to come."""

    def __init__(self, spec: str) -> None:
        self.name, _, action = spec.partition(":")
        self.action, _, nth = action.partition("@")
        self.left = int(nth or "1")
        assert self.name in POINTS, f"no such point: {spec}"
        assert self.action in ("kill", "raise", "segv"), f"no such action: {spec}"

    def pass_by(self, name: str) -> None:
        if name != self.name:
            return
        self.left -= 1
        if self.left != 0:
            return
        if self.action == "raise":
            raise Fault(name)
        os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.SIGSEGV)


_armed: _Armed | None = None


def arm(environ: Mapping[str, str]) -> None:
    """Take the fault that the environment names, if it says that this is a test."""
    global _armed
    spec = environ.get("MLX_MCP_FAULT") if environ.get("MLX_MCP_TEST_MODE") == "1" else None
    _armed = _Armed(spec) if spec else None


def point(name: str) -> None:
    """Go on, unless a test wants this process to break here."""
    if _armed is not None:
        _armed.pass_by(name)


arm(os.environ)
