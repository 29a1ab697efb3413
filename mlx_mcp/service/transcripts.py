"""What was said in a session."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mlx_mcp.chat.transcript import Said, said_in
from mlx_mcp.core.session import SessionInfo
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.service import Service


@dataclass(frozen=True)
class Transcript:
    """A session and what was said in it, to the end of its latest finished turn."""

    info: SessionInfo
    messages: list[Said]


async def transcript(service: Service, caller: Caller, session: str) -> Transcript:
    """What was said in a session of the caller's, by handle or name; one that is only on disk is read from there.

    Raises:
        UnknownSession: the caller has none, or has it no more.
        StorageError: it is on disk and cannot be read.
        EngineDead: the engine thread has ended.
    """
    info, text = await service.engine.transcript(caller.tenant, session)
    return Transcript(info, said_in(json.loads(text or "[]")))
