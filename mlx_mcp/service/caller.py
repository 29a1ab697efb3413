"""On whose behalf something is done."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader


@dataclass(frozen=True)
class Caller:
    """Who calls: a face makes one for each call, and hands it on.

    Sessions are their `tenant`'s, and only prompts of one tenant share keys and values. `activity` is that of the
    connection that the call came by, and `files` reads what the caller may have read. `who` is what the client calls
    itself, made by `called`; sessions note it with each of their turns.
    """

    tenant: str = ""
    activity: Activity = field(default_factory=Activity)
    files: FileReader = field(default_factory=lambda: FileReader((), 0, 0))
    who: str = ""
