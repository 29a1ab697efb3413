"""The page and its state without a browser: what is in them, and that nothing that was said is."""

import asyncio
import base64
import hashlib
import re

import pytest

from mlx_mcp.api.page.page import page
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.overview import MAX_SESSIONS, overview
from mlx_mcp.service.service import Service
from mlx_mcp.service.sessions import create_session, fork_session
from tests.api.http.watched import watched
from tests.engine.test_client import until
from tests.fakes import FakeLoader, fake_client
from tests.service.house import asked, unheard

ANN, BOB = Caller("ann"), Caller("bob")


@pytest.fixture
def service():
    service = Service(fake_client(FakeLoader(context_tokens=2000), block_tokens=16), Registry(None))
    yield service
    service.engine.close()


async def family(service, caller):
    """A session with two forks, one of which has a fork."""
    options = SessionOptions("base", pinned=True)
    await create_session(service, caller, asked("canary " * 5), "tiny", (), options, unheard)
    await fork_session(service, caller, "base", 2, ("left", "right"), "")
    await fork_session(service, caller, "left", 1, (), "")


def tree(state):
    names = {each["id"]: each["name"] for each in state["sessions"]}
    return [(each["name"], names.get(each["parent"], "")) for each in state["sessions"]]


async def test_sessions_are_told_with_whom_they_were_forked_from(service):
    await family(service, ANN)
    state = overview(service, "ann")
    [base, left, right, (nameless, parent)] = tree(state)
    assert (base, left, right, parent) == (("base", ""), ("left", "base"), ("right", "base"), "left")
    assert re.fullmatch(r"s_\w{6}…", nameless)
    assert state["sessions"][0]["pinned"]
    assert state["sessions"][0]["tokens"] == state["sessions"][1]["tokens"] > 0


async def test_names_and_handles_of_other_callers_are_not_shown_and_what_they_take_is(service):
    await family(service, ANN)
    state = overview(service, "bob")
    assert [name for name, _ in tree(state)] == [""] * 4
    assert state["num_sessions"] == 4
    assert [name for name, _ in tree(overview(service))][:3] == ["base", "left", "right"]
    handles = list(service.engine.thread.sessions)
    assert not any(handle[2:] in str(overview(service)) for handle in handles)


async def test_a_fork_whose_parent_was_closed_is_a_root(service):
    await family(service, ANN)
    await service.engine.close_sessions("ann", ("left",))
    assert [parent for _, parent in tree(overview(service, "ann"))] == ["", "base", ""]


async def test_only_the_sessions_that_were_used_last_are_listed(service):
    await create_session(service, ANN, asked("x"), "tiny", (), SessionOptions("base"), unheard)
    for _ in range(9):
        await fork_session(service, ANN, "base", 60, (), "")
    state = overview(service, "ann")
    assert (len(state["sessions"]), state["num_sessions"]) == (MAX_SESSIONS, 541)


async def test_calls_say_what_they_do_or_wait_for_and_nothing_of_what_was_said(service):
    runner = service.engine.loader.runner
    runner.endless = True
    options = Options(model="tiny")
    calls = [asyncio.create_task(generate(service, ANN, asked("canary"), options, unheard)) for _ in range(2)]
    await until(lambda: all(call["tokens"] for call in overview(service)["calls"]) and overview(service)["calls"])
    state = overview(service, "ann")
    for call in state["calls"]:
        assert re.fullmatch(r"generating: \d+ tokens", call["does"])
        assert call["runs"]
        assert call["since_s"] > 0
    assert "canary" not in str(state)
    assert state["tokens"]["output"] > 0
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert overview(service)["calls"] == []


async def test_a_session_that_does_not_exist_is_not_shown_by_the_name_that_a_caller_wrote(service):
    runner = service.engine.loader.runner
    runner.gate.clear()
    call = asyncio.create_task(generate(service, ANN, asked("x"), Options(model="tiny"), unheard))
    await until(lambda: service.observer.active)
    waits = asyncio.create_task(generate(service, ANN, asked("x"), Options(session="canary"), unheard))
    await until(lambda: len(service.observer.active) == 2 or waits.done())
    assert "canary" not in str(overview(service, "ann"))
    runner.gate.set()
    await asyncio.gather(call, waits, return_exceptions=True)


async def test_the_state_is_that_of_the_caller_who_asks():
    engine = fake_client()
    async with watched(engine) as (http, service):
        await create_session(service, Caller(""), asked("x"), "tiny", (), SessionOptions("mine"), unheard)
        await create_session(service, ANN, asked("x"), "tiny", (), SessionOptions("hers"), unheard)
        response = await http.get("/page/state")
    assert [each["name"] for each in response.json()["sessions"]] == ["mine", ""]
    assert response.headers["cache-control"] == "no-store"
    engine.close()


def test_the_page_needs_nothing_from_elsewhere_and_runs_only_its_own_script():
    response = page()
    text, policy = response.body.decode(), response.headers["content-security-policy"]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "innerHTML" not in text
    assert not re.search(r"\son\w+=|\sstyle=", text)
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        [inside] = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
