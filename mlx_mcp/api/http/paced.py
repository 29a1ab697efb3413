"""When requests of a principal begin, so that whoever asks much does not keep the event loop from the others.

The loop serves requests one after the other, each for some milliseconds, whether they are answered or refused. Hence:

    - Who is over its requests a minute is held for HELD_S with each further one: whoever asks again at once would keep
      the loop busy with refusals alone.
    - While another principal asks too, a principal's requests begin at most every GAP_S, after a burst of NUM_AT_ONCE.

A client that has left while it was held is forgotten. Requests without a principal pass.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mcp.service.limits import Limiter

HELD_S = 0.5
GAP_S = 1 / 80
NUM_AT_ONCE = 16
RECENT_S = 1.0  # who has asked within that time counts as asking
MAX_KNOWN = 1_000  # principals that are remembered before those who ask no more are forgotten


class Paced:
    """Has an app answer each request when it is its turn."""

    def __init__(self, app: ASGIApp, limits: Limiter, held_s: float = HELD_S) -> None:
        self._app, self._limits, self._held_s = app, limits, held_s
        self._asked_at: dict[str, float] = {}  # by principal
        self._even_at: dict[str, float] = {}  # when a principal will have asked no faster than every GAP_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the app answer, now or later."""
        tenant = scope.get("state", {}).get("tenant") if scope["type"] == "http" else None
        pause_s = 0.0 if tenant is None else self.pause_s(tenant, asyncio.get_running_loop().time())
        if pause_s:
            await asyncio.sleep(pause_s)
            first = await receive()
            if first["type"] == "http.disconnect":
                return
            receive = after(first, receive)
        await self._app(scope, receive, send)

    def pause_s(self, tenant: str, now: float) -> float:
        """How long the next request of a principal is held; it counts as asked at this moment."""
        if len(self._asked_at) > MAX_KNOWN:
            self._asked_at = {each: at for each, at in self._asked_at.items() if now - at < RECENT_S}
            self._even_at = {each: at for each, at in self._even_at.items() if at > now}
        alone = all(each == tenant or now - at >= RECENT_S for each, at in self._asked_at.items())
        self._asked_at[tenant] = now
        even_at = max(now, self._even_at.get(tenant, now))
        self._even_at[tenant] = even_at + GAP_S
        if self._limits.is_over(tenant):
            return self._held_s
        return 0.0 if alone else max(0.0, even_at - now - NUM_AT_ONCE * GAP_S)


def after(first: Message, receive: Receive) -> Receive:
    """What gives a message that was received already, and then those that follow."""
    waiting = [first]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message
