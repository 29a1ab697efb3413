"""Keeps stored answers within what their principal may have: the sessions of the oldest are closed for new ones."""

from __future__ import annotations

from contextlib import suppress

from mlx_mcp.errors import MlxMcpError
from mlx_mcp.service.replies import Reply
from mlx_mcp.service.service import Service, known_sessions


async def keep(service: Service, reply: Reply) -> None:
    """Keep an answer, and close the sessions of those that have to go for it."""
    for gone in service.replies.keep(reply, known_sessions(service)):
        await close(service, gone)


async def make_room(service: Service, tenant: str, parent: Reply | None) -> None:
    """See that one more session may be opened for an answer, which goes on in a fork of the `parent`'s.

    Answers are stored unless a client says otherwise, so that a principal would reach its limits without having asked
    for anything. Half of its sessions are left for what it names itself.
    """
    limits, kept = service.limits.limits_of(tenant), 0 if parent is None else 1
    if limits.sessions is not None:
        for gone in service.replies.shrink(tenant, max(kept, limits.sessions // 2 - 1)):
            await close(service, gone)
    while limits.session_bytes is not None and await service.engine.held_bytes(tenant) >= limits.session_bytes:
        oldest = service.replies.shrink(tenant, max(kept, service.replies.num_kept(tenant) - 1))
        if not oldest:
            return
        await close(service, oldest[0])


async def close(service: Service, reply: Reply) -> None:
    """Close the session of an answer that is no longer kept, if it has one."""
    if reply.session_id:
        with suppress(MlxMcpError):
            await service.engine.close_sessions(reply.tenant, (reply.session_id,))
