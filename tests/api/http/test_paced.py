"""Callers who ask much, or go on asking over their limit, are held for a moment each time, and nobody else is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from mlx_mcp.api.http.paced import GAP_S, MAX_KNOWN, NUM_AT_ONCE, RECENT_S, Paced
from mlx_mcp.errors import RateLimited
from mlx_mcp.service.limits import Limiter, Limits

HELD_S = 0.02
BODY = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}]


class Heard:
    """An app that notes who reached it, with which body."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.reached.append((scope["state"].get("tenant", ""), body))


@pytest.fixture
def limits() -> Limiter:
    """Two requests a minute for each; ann has made hers."""
    limiter = Limiter(lambda tenant: Limits(requests_per_minute=2), clock=lambda: 0.0)
    limiter.request("ann", 2)
    with pytest.raises(RateLimited):
        limiter.request("ann")
    return limiter


async def ask(paced: Paced, tenant: str | None, messages: Sequence[Message] = BODY) -> None:
    waiting = list(messages)

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(_: Message) -> None:
        raise AssertionError("nothing is answered")

    state: dict[str, Any] = {} if tenant is None else {"tenant": tenant}
    await paced({"type": "http", "state": state}, receive, send)


async def test_who_is_over_the_limit_is_held_and_then_answered_as_ever(limits: Limiter) -> None:
    heard = Heard()
    paced = Paced(heard, limits, HELD_S)
    await asyncio.gather(ask(paced, "ann"), ask(paced, "bob"), ask(paced, None))
    assert heard.reached == [("bob", b"ab"), ("", b"ab"), ("ann", b"ab")]


async def test_who_left_while_held_costs_nothing_more(limits: Limiter) -> None:
    heard = Heard()
    await ask(Paced(heard, limits, HELD_S), "ann", [{"type": "http.disconnect"}])
    assert heard.reached == []


async def test_where_nothing_is_limited_nobody_is_held() -> None:
    heard, limiter = Heard(), Limiter()
    limiter.request("ann", 1000)
    await ask(Paced(heard, limiter, held_s=3600), "ann")
    assert heard.reached == [("ann", b"ab")]


def pauses(paced: Paced, tenant: str, num: int, now: float) -> list[float]:
    return [paced.pause_s(tenant, now) for _ in range(num)]


def test_while_another_asks_what_comes_after_a_burst_begins_at_a_steady_rate() -> None:
    paced = Paced(Heard(), Limiter())
    paced.pause_s("bob", 0.0)
    assert pauses(paced, "ann", NUM_AT_ONCE + 1, 0.5) == [0.0] * (NUM_AT_ONCE + 1)
    assert pauses(paced, "ann", 3, 0.5) == pytest.approx([GAP_S, 2 * GAP_S, 3 * GAP_S])
    assert paced.pause_s("bob", 0.5) == 0.0
    assert paced.pause_s("ann", 0.5 + 40 * GAP_S) == 0.0  # the burst is paid for


def test_whoever_asks_alone_is_never_held() -> None:
    paced = Paced(Heard(), Limiter())
    paced.pause_s("bob", 0.0)
    assert pauses(paced, "ann", 1000, RECENT_S) == [0.0] * 1000


def test_principals_who_ask_no_more_are_forgotten() -> None:
    paced = Paced(Heard(), Limiter())
    for number in range(MAX_KNOWN + 1):
        paced.pause_s(f"p{number}", 0.0)
    paced.pause_s("ann", 10.0)
    assert set(paced._asked_at) == set(paced._even_at) == {"ann"}
