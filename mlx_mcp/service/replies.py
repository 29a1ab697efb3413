"""Answers that callers can ask for again, and go on from, by an id. Knows no protocol: an answer is what a face gave.

An answer's conversation is a session, which the engine keeps; here is what the session's tokens do not tell. It is in
memory alone, and bounded for each tenant. One that has a session is there for as long as that is.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.chat.message import Message
from mlx_mcp.errors import UnknownReply
from mlx_mcp.service.jobs import Job

MAX_REPLIES = 256  # of one tenant
MAX_BYTES = 64 << 20  # of one tenant
SESSIONLESS_TTL_S = 3600.0  # how long one without a session is kept


@dataclass
class Reply:
    """An answer, what it answers, and the conversation that it ends."""

    reply_id: str
    tenant: str
    answer: Any  # as the face shows it
    given: Any = None  # what was new in the request, as the face shows it
    told: Any = None  # what holds for the whole conversation, by which a face knows whether that can go on
    messages: tuple[Message, ...] = ()  # all of the conversation, the answer included
    num_bytes: int = 0
    session_id: str = ""  # empty while it is computed, and if it has failed
    job: Job | None = None  # the work that computes it, where nobody waits for that
    kept_at: float = field(default_factory=time.monotonic)


class Replies:
    """The stored answers of all tenants. Those that nobody has asked for the longest go first."""

    def __init__(self, max_replies: int = MAX_REPLIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_replies, self._max_bytes = max_replies, max_bytes
        self._of: dict[str, dict[str, Reply]] = {}  # by tenant and id, used last last

    def keep(self, reply: Reply, sessions: Container[str]) -> list[Reply]:
        """Keep an answer; returns those that had to go for it, whose sessions are to be closed.

        `sessions` are the handles there are now: answers whose session has ended are forgotten.
        """
        of = self._of.setdefault(reply.tenant, {})
        of.pop(reply.reply_id, None)
        of[reply.reply_id] = reply
        for each in list(of.values()):
            if not self._lives(each, sessions):
                del of[each.reply_id]
        gone = []
        num_bytes = sum(each.num_bytes for each in of.values())
        for each in list(of.values()):
            if each is reply or (len(of) <= self._max_replies and num_bytes <= self._max_bytes):
                break
            num_bytes -= each.num_bytes
            gone.append(of.pop(each.reply_id))
        return gone

    def get(self, tenant: str, reply_id: str, sessions: Container[str]) -> Reply:
        """A tenant's answer, which is the last that has to go from then on.

        Raises:
            UnknownReply: there is none, no more, or it is another tenant's.
        """
        of = self._of.get(tenant, {})
        reply = of.get(reply_id)
        if reply is None or not self._lives(reply, sessions):
            raise UnknownReply(reply_id)
        of[reply_id] = of.pop(reply_id)
        return reply

    def shrink(self, tenant: str, most: int) -> list[Reply]:
        """Keep no more than so many answers with sessions; returns those that have to go, which are to be closed."""
        of = self._of.get(tenant, {})
        held = [reply for reply in of.values() if reply.session_id]
        return [of.pop(reply.reply_id) for reply in held[: max(0, len(held) - most)]]

    def num_kept(self, tenant: str) -> int:
        """How many of a tenant's answers have a session."""
        return sum(bool(reply.session_id) for reply in self._of.get(tenant, {}).values())

    def forget(self, reply: Reply) -> None:
        """Keep an answer no longer; its session is to be closed."""
        self._of.get(reply.tenant, {}).pop(reply.reply_id, None)

    def _lives(self, reply: Reply, sessions: Container[str]) -> bool:
        if reply.session_id:
            return reply.session_id in sessions
        return time.monotonic() - reply.kept_at < SESSIONLESS_TTL_S


def new_reply_id(prefix: str) -> str:
    """An id for an answer that nobody can guess; it can be a session's name as well."""
    return f"{prefix}{secrets.token_hex(16)}"
