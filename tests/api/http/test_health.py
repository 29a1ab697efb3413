"""Health over HTTP: what a probe is told of an engine that lives, hangs, drains or has died."""

import asyncio
import dataclasses

import pytest

from mlx_mcp.errors import EngineDead
from mlx_mcp.service.generate import Options, generate
from tests.api.http.watched import watched
from tests.engine.test_client import until
from tests.fakes import fake_client
from tests.service.house import CALLER, asked, unheard


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


async def probe(http, name):
    response = await http.get(f"/health/{name}")
    return response.status_code, response.json()


@pytest.mark.parametrize("name", ["live", "ready", "startup"])
async def test_a_server_that_waits_for_its_first_call_is_well(engine, name):
    async with watched(engine) as (http, _):
        status, body = await probe(http, name)
    assert (status, body["status"]) == (200, "ok")


async def test_a_dead_engine_thread_makes_the_server_unready_before_its_callers_hear_of_it(engine, monkeypatch):
    async with watched(engine) as (http, service):
        await generate(service, CALLER, asked("hello"), Options(model="tiny"), unheard)
        assert (await probe(http, "ready"))[0] == 200
        monkeypatch.setattr("mlx_mcp.engine.engine.Engine.check_time", lambda engine: 1 / 0)  # outside of any step
        with pytest.raises(EngineDead):
            await generate(service, CALLER, asked("hello"), Options(model="tiny"), unheard)
        status, body = await probe(http, "ready")
        assert (status, body["status"]) == (503, "dead")
        assert "Start the server again" in body["reasons"][0]
        assert (await probe(http, "live"))[0] == 200
        assert (await http.get("/health")).status_code == 503


async def test_an_engine_that_hangs_in_a_step_is_not_ready(engine):
    engine.loader.runner.gate.clear()
    async with watched(engine) as (http, service):
        service.lifecycle.slow_step_s = 0.05
        call = asyncio.create_task(generate(service, CALLER, asked("hello"), Options(model="tiny"), unheard))
        await until(lambda: engine.thread.step_s > 0.05)
        status, body = await probe(http, "ready")
        assert (status, body["status"]) == (503, "slow")
        assert "longer than ready_step_s" in body["reasons"][0]
        engine.loader.runner.gate.set()
        await call
        assert (await probe(http, "ready"))[0] == 200


async def test_a_server_that_is_about_to_end_is_not_ready_and_lives(engine):
    async with watched(engine) as (http, service):
        service.lifecycle.draining = True
        status, body = await probe(http, "ready")
        assert (status, body["status"]) == (503, "draining")
        assert "Send calls to another" in body["reasons"][0]
        assert (await probe(http, "live"))[0] == 200


@pytest.mark.parametrize(
    ("stats", "startup", "ready", "status"),
    [
        ({"opening": True, "storage": "ok"}, 503, 200, "starting"),
        ({"storage": "the disk is full"}, 200, 200, "degraded"),
    ],
)
async def test_the_state_of_the_disk_is_told(engine, stats, startup, ready, status):
    engine.thread._stats = dataclasses.replace(engine.thread._stats, **stats)
    async with watched(engine) as (http, _):
        assert (await probe(http, "startup"))[0] == startup
        code, body = await probe(http, "ready")
    assert (code, body["status"]) == (ready, status)
    assert body["reasons"][0].startswith(("Calls wait until", "Nothing is kept on disk now"))
