"""The names that people give sessions. A name stands for a session's handle in every call of one tenant."""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq

from mlx_mcp.errors import InvalidRequest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HANDLE_PREFIX = "s_"
RESERVED = (HANDLE_PREFIX, "x-")  # with which handles begin: the latter are of sandboxes


class SessionNames:
    """Which session has which name."""

    def __init__(self) -> None:
        self.ids: dict[tuple[str, str], str] = {}  # (tenant, name) → the session's handle

    def find(self, tenant: str, name: str) -> str | None:
        """The handle of the session that has a name; None if no session has it."""
        return self.ids.get((tenant, name))

    def of(self, tenant: str) -> list[str]:
        """The names of a tenant's sessions."""
        return [name for owner, name in self.ids if owner == tenant]

    def add(self, tenant: str, name: str, session_id: str) -> None:
        """Give a session a name, unless the name is empty."""
        if name:
            self.ids[tenant, name] = session_id

    def remove(self, tenant: str, name: str) -> None:
        """Free a name; nothing is done if no session has it."""
        self.ids.pop((tenant, name), None)

    def check(self, tenant: str, names: Seq[str]) -> None:
        """See that new sessions may have these names.

        Raises:
            InvalidRequest: one of them cannot be a name, is there twice, or is taken.
        """
        for name in names:
            if not NAME.fullmatch(name):
                raise InvalidRequest(
                    f"{name[:80]!r} cannot be a session's name: take 1 to 64 letters, digits, dots, dashes, "
                    "underscores."
                )
            if name.startswith(RESERVED):
                raise InvalidRequest(
                    f"{name[:80]!r} cannot be a session's name, since handles begin with {' or '.join(RESERVED)}: take "
                    "another."
                )
            if names.count(name) > 1:
                raise InvalidRequest(f"`names` has a fork named {name!r} already: give each a name of its own.")
            if (tenant, name) in self.ids:
                raise InvalidRequest(f"There is a session named {name!r} already; close it, or take another name.")
