import asyncio

import pytest

from mlx_mcp.core.ports import LoadProgress
from mlx_mcp.engine.messages import Load, Unload
from mlx_mcp.errors import ModelBusy, ModelError, UnknownModel
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.models import Fits, Freed, fits, list_models, load_model, unload_model
from mlx_mcp.service.service import Service
from mlx_mcp.stats import EngineStats, ModelStats
from tests.fakes import FakeLoader, fake_client
from tests.service.house import CALLER, asked, unheard


class Loader(FakeLoader):
    """Cannot read the weights of the model that is `broken`."""

    broken = ""

    def materialise(self, prepared):
        if prepared.name == self.broken:
            yield LoadProgress("reading", 0, 100)
            raise OSError("disk gone")
        return (yield from super().materialise(prepared))


@pytest.fixture
def service(tmp_path):
    """Room for the weights of one model; there are `embedded` and `org/other`."""
    snapshot = tmp_path / "models--org--other" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (snapshot / "model.safetensors").write_bytes(b"x" * 60)
    registry = Registry(None, tmp_path)
    client = fake_client(Loader(context_tokens=2000), max_weights_bytes=150)
    client.registry = registry
    yield Service(client, registry)
    assert client.close()


async def until(condition):
    """Wait for what another thread will make true; asyncio has no event for it."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_model_is_loaded_before_its_first_call_and_says_how_far_it_is(service):
    lines = []

    async def report(meters):
        lines.extend(meter.line for meter in meters)

    caller = Caller("us")
    model = await load_model(service, caller, "org/other", report)
    assert (model.loaded, model.fits, model.weights_bytes, model.kv_bytes_per_1k) == (True, Fits.YES, 100, 1000)
    assert any(line.startswith("loading org/other: reading") for line in lines)
    assert not caller.activity.calls
    again = await load_model(service, caller, "org/other", report)
    assert (again.loaded, service.engine.loader.materialised) == (True, ["org/other"])


async def test_unloading_frees_the_weights_and_the_sessions_go_on_when_the_model_is_back(service):
    first = (await generate(service, CALLER, asked("abc"), Options("embedded", keep=True), unheard)).result
    assert await unload_model(service, "embedded") == Freed("embedded", 100)
    assert await unload_model(service, "embedded") == Freed("embedded", 0)
    await until(lambda: not service.engine.stats.models)
    assert [model.loaded for model in await list_models(service)] == [False, False]
    turn = await generate(service, CALLER, asked("xyz"), Options(session=first.session.session_id), unheard)
    assert (turn.result.text, turn.result.cached_tokens) == ("xyz", 6)
    assert service.engine.loader.materialised == ["embedded", "embedded"]


async def test_a_model_with_a_call_is_not_unloaded_and_one_that_lacks_room_waits_for_it(service):
    runner, inbox = service.engine.loader.runner, service.engine.thread
    runner.endless = True
    runner.gate.clear()
    call = asyncio.create_task(generate(service, CALLER, asked("abc"), Options("embedded"), unheard))
    await until(lambda: runner.steps)  # the engine is in its first step until the gate opens
    lines = []

    async def report(meters):
        lines.append(meters[0].line)

    unloading = asyncio.create_task(unload_model(service, "embedded"))
    loading = asyncio.create_task(load_model(service, CALLER, "org/other", report))
    await until(lambda: {Unload, Load} <= {type(command) for command in inbox._inbox})
    runner.gate.set()
    with pytest.raises(ModelBusy, match=r"calls run or wait for it\. Wait for its calls to end"):
        await unloading
    assert (await loading).loaded
    assert any("waits for embedded to make room for org/other" in line for line in lines)
    assert (await call).result.model == "embedded"
    await until(lambda: service.engine.stats.models == ("org/other",))
    assert [model.loaded for model in await list_models(service)] == [False, True]


async def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(service):
    for ask in (load_model(service, CALLER, "other", unheard), unload_model(service, "Org/Othr")):
        with pytest.raises(UnknownModel, match=r"Did you mean 'org/other'\? Call list_models"):
            await ask
    with pytest.raises(UnknownModel) as caught:
        await unload_model(service, "x" * 10_000)
    assert "Did you mean" not in str(caught.value)


async def test_a_model_that_cannot_be_loaded_says_why_and_the_one_that_a_user_had_loaded_comes_back(service):
    await load_model(service, CALLER, "embedded", unheard)
    service.engine.loader.broken = "org/other"
    with pytest.raises(ModelError, match="disk gone"):
        await load_model(service, CALLER, "org/other", unheard)
    await until(lambda: service.engine.stats.models == ("embedded",))
    assert service.engine.loader.materialised == ["embedded", "embedded"]


def test_whether_a_model_fits_depends_on_what_is_pinned_and_what_may_be_unloaded():
    def stats(**models):
        each = {name: ModelStats(size, 1, 0.0, 0, pinned) for name, (size, pinned) in models.items()}
        return EngineStats(
            of_models=each, weights_bytes=sum(m.weights_bytes for m in each.values()), max_weights_bytes=100
        )

    assert fits(100, stats()) is Fits.YES
    assert fits(101, stats()) is Fits.NO
    assert fits(50, stats(a=(60, False))) is Fits.AFTER_UNLOADING
    assert fits(50, stats(a=(60, True))) is Fits.NO
    assert fits(40, stats(a=(60, True))) is Fits.YES
    assert fits(None, stats()) is Fits.UNKNOWN
    assert fits(50, EngineStats()) is Fits.UNKNOWN
