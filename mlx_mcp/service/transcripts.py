"""What was said in a session."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mlx_mcp.chat.transcript import Said, said_in
from mlx_mcp.core.origin import Origin
from mlx_mcp.core.session import SessionInfo
from mlx_mcp.errors import StorageError, UnknownSession
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.service import Service

MAX_SEARCHED = 200  # sessions, or sandboxes


@dataclass(frozen=True)
class Transcript:
    """A session and what was said in it, to the end of its latest finished turn."""

    info: SessionInfo
    messages: list[Said]
    origins: Mapping[int, Origin]  # of its turns, by how many tokens come before them

    def origin(self, said: Said) -> Origin | None:
        """Who asked for the turn in which something was said, and when; None if that is not known."""
        return None if said.turn is None else self.origins.get(said.turn)


async def said_in_them(
    service: Service, caller: Caller, infos: Sequence[SessionInfo], text: str
) -> list[tuple[SessionInfo, Origin | None]]:
    """Those of the caller's sessions in which a text was said, capitals or not. The first MAX_SEARCHED are read.

    Each comes with who asked for the latest turn in which it was said. What cannot be read does not count.

    Raises:
        EngineDead: the engine thread has ended.
    """
    wanted, found = text.casefold(), []
    for info in infos[:MAX_SEARCHED]:
        with suppress(UnknownSession, StorageError):
            read = await transcript(service, caller, info.session_id)
            said = next((each for each in reversed(read.messages) if wanted in each.text.casefold()), None)
            if said is not None:
                found.append((info, read.origin(said)))
    return found


async def transcript(service: Service, caller: Caller, session: str) -> Transcript:
    """What was said in a session of the caller's, by handle or name; one that is only on disk is read from there.

    Raises:
        UnknownSession: the caller has none, or has it no more.
        StorageError: it is on disk and cannot be read.
        EngineDead: the engine thread has ended.
    """
    info, text, origins = await service.engine.transcript(caller.tenant, session)
    return Transcript(info, said_in(json.loads(text or "[]")), {origin.begin: origin for origin in origins})
