"""What every runtime's dumps begin with: a line of JSON that tells which version of which interpreter made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_mcp.errors import SandboxFailed

DAMAGED = "The state of this sandbox is damaged. Begin a new sandbox."


def made(head: Mapping[str, Any], state: bytes) -> bytes:
    """A dump. `head` has its `version`."""
    return json.dumps(head).encode() + b"\n" + state


def opened(dump: bytes, version: str) -> tuple[dict[str, Any], bytes]:
    """The head and the state of a dump of this version.

    Raises:
        SandboxFailed: it is no dump, or one of another version.
    """
    head, _, state = dump.partition(b"\n")
    try:
        found: dict[str, Any] = json.loads(head)
        of = str(found["version"])
    except (ValueError, KeyError, TypeError) as exc:
        raise SandboxFailed("What was given is not the state of a sandbox. Begin a new sandbox.") from exc
    if of != version:
        raise SandboxFailed(f"This state was kept by {of[:80]!r}, and this is {version!r}. Run its programs again.")
    return found, state
