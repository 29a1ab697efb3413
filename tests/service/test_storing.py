"""Stored answers within what their principal may have."""

import dataclasses
from contextlib import aclosing

import pytest

from mlx_mcp.service.generate import Options
from mlx_mcp.service.limits import Limiter, Limits
from mlx_mcp.service.replies import Replies, Reply
from mlx_mcp.service.several import stream_answers
from mlx_mcp.service.storing import keep, make_room
from mlx_mcp.service.values import Sampling, SessionOptions
from tests.service.house import CALLER, asked, make_service


@pytest.fixture
def service():
    service = make_service()
    yield service
    service.engine.close()


def limited(service, replies=None, **limits):
    return dataclasses.replace(
        service, limits=Limiter(lambda tenant: Limits(**limits)), replies=replies or service.replies
    )


async def stored(service, name, prompt="hello"):
    """A stored answer with a session of its name."""
    options = Options("tiny", keep=True, opening=SessionOptions(name), sampling=Sampling(max_tokens=1))
    async with aclosing(stream_answers(service, CALLER, asked(prompt), 1, options)) as pieces:
        *_, (_, result) = [piece async for piece in pieces]
    reply = Reply(name, CALLER.tenant, name, session_id=result.session.session_id)
    await keep(service, reply)
    return reply


def names(service):
    return [info.name for info in service.engine.thread.sessions.values()]


async def test_the_sessions_of_answers_that_have_to_go_are_closed(service):
    service = limited(service, Replies(max_replies=2))
    for name in "abc":
        await stored(service, name)
    assert names(service) == ["b", "c"]


async def test_half_of_a_principals_sessions_are_left_for_others_than_answers(service):
    service = limited(service, sessions=6)
    for name in "abcd":
        await make_room(service, CALLER.tenant, None)
        await stored(service, name)
    assert names(service) == ["b", "c", "d"]


async def test_what_is_gone_on_from_stays(service):
    service = limited(service, sessions=2)
    reply = await stored(service, "a")
    await make_room(service, CALLER.tenant, reply)
    assert names(service) == ["a"]
    await make_room(service, CALLER.tenant, None)
    assert names(service) == []


async def test_answers_go_until_the_others_fit_into_memory(service):
    for name in "abc":
        await stored(service, name, prompt=name * 100)
    held = await service.engine.held_bytes(CALLER.tenant)
    service = limited(service, session_bytes=held - 50)
    last = service.replies.get(CALLER.tenant, "a", service.engine.thread.sessions)  # asked for last
    await make_room(service, CALLER.tenant, last)
    assert names(service) == ["a", "c"]


async def test_what_no_answer_holds_is_left_to_the_limits(service):
    await stored(service, "a", prompt="a" * 100)
    service = limited(service, session_bytes=1)
    await make_room(service, CALLER.tenant, service.replies.get(CALLER.tenant, "a", service.engine.thread.sessions))
    assert names(service) == ["a"]
