"""What was said in a session."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from mlx_mcp.chat.transcript import Said, said_in
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


async def said_in_them(service: Service, caller: Caller, infos: Sequence[SessionInfo], text: str) -> list[SessionInfo]:
    """Those of the caller's sessions in which a text was said, capitals or not. The first MAX_SEARCHED are read.

    What cannot be read does not count.

    Raises:
        EngineDead: the engine thread has ended.
    """
    wanted, found = text.casefold(), []
    for info in infos[:MAX_SEARCHED]:
        with suppress(UnknownSession, StorageError):
            said = (await transcript(service, caller, info.session_id)).messages
            if any(wanted in each.text.casefold() for each in said):
                found.append(info)
    return found


async def transcript(service: Service, caller: Caller, session: str) -> Transcript:
    """What was said in a session of the caller's, by handle or name; one that is only on disk is read from there.

    Raises:
        UnknownSession: the caller has none, or has it no more.
        StorageError: it is on disk and cannot be read.
        EngineDead: the engine thread has ended.
    """
    info, text = await service.engine.transcript(caller.tenant, session)
    return Transcript(info, said_in(json.loads(text or "[]")))
