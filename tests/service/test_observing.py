"""What the observer notes of generations, and health as it is derived from the engine."""

import asyncio

import pytest

from mlx_mcp.core.scheduler import Limits
from mlx_mcp.errors import InvalidRequest, UnknownModel
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.generate import Options, generate, stream
from mlx_mcp.service.health import readiness
from mlx_mcp.service.observing import CANCELLED, FAULT, MAX_LABELS, OTHER, Observer
from mlx_mcp.service.service import Service
from tests.engine.test_client import until
from tests.fakes import FakeLoader, fake_client
from tests.service.house import CALLER, asked, unheard


@pytest.fixture
def service():
    service = Service(fake_client(FakeLoader(context_tokens=2000), Limits(max_running=1)), Registry(None))
    yield service
    service.engine.close()


@pytest.fixture
def ended(service):
    """The generations that have ended."""
    watched = []
    service.observer.ending.append(watched.append)
    return watched


async def say(service, prompt, **options):
    return await generate(service, CALLER, asked(prompt), Options(model="tiny", **options), unheard)


async def test_the_moments_of_a_generation_follow_each_other(service, ended):
    await say(service, "hello")
    [one] = ended
    assert one.outcome == "stop"
    assert one.num_tokens == 5
    moments = [one.began_at, one.loaded_at, one.admitted_at, one.first_at, one.latest_at, one.ended_at]
    assert moments == sorted(moments)
    assert service.observer.active == {}


async def test_a_call_that_waits_for_a_place_is_admitted_when_the_other_has_ended(service, ended):
    await asyncio.gather(say(service, "first"), say(service, "other"))
    first, other = ended
    assert first.began_at <= first.admitted_at < other.admitted_at
    assert sum(service.engine.stats.queue_s.counts) == 2


async def test_every_token_after_the_first_has_its_distance_from_the_one_before(service):
    await say(service, "a" * 20)
    assert sum(service.observer.between_tokens_s.snapshot.counts) == 19
    assert sum(service.observer.first_token_s.snapshot.counts) == 1


async def test_a_generation_that_is_left_is_counted_as_cancelled(service, ended):
    service.engine.loader.runner.endless = True
    async for _ in (updates := stream(service, CALLER, asked("hello"), Options(model="tiny"))):
        if service.observer.active[1].num_tokens:
            break
    await updates.aclose()
    assert service.observer.generations == {("", CANCELLED): 1}
    assert ended[0].outcome == CANCELLED
    assert service.observer.errors == {}


async def test_an_error_is_counted_by_its_kind(service, ended):
    with pytest.raises(UnknownModel):
        await generate(service, CALLER, asked("hello"), Options(model="none"), unheard)
    with pytest.raises(InvalidRequest):
        await say(service, "")
    assert service.observer.errors == {"UnknownModel": 1, "InvalidRequest": 1}
    assert [one.outcome for one in ended] == ["UnknownModel", "InvalidRequest"]


async def test_a_fault_of_ours_is_counted_as_one(service, monkeypatch):
    monkeypatch.setattr(service.engine, "generate", lambda request: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await say(service, "hello")
    assert service.observer.errors == {FAULT: 1}


def test_an_error_that_comes_by_twice_is_counted_once():
    observer, error = Observer(), UnknownModel("x", [])
    observer.failed(error)
    observer.failed(error)
    observer.failed(UnknownModel("x", []))
    assert observer.errors == {"UnknownModel": 2}


def test_names_beyond_the_first_hundred_are_one_label():
    observer = Observer()
    labels = {observer.label(f"model {i}") for i in range(3 * MAX_LABELS)}
    assert len(labels) == MAX_LABELS + 1
    assert OTHER in labels
    assert observer.label("model 5") == "model 5"


async def test_an_engine_that_hangs_is_not_ready(service):
    runner = service.engine.loader.runner
    runner.gate.clear()
    service.lifecycle.slow_step_s = 0.02
    call = asyncio.create_task(say(service, "hello"))
    await until(lambda: service.engine.thread.step_s > 0.02)
    assert readiness(service).status == "slow"
    runner.gate.set()
    await call
    assert readiness(service).ready
