"""Tools about models, and the user's consent to a download, over fakes."""

import pytest
from mcp import Client
from mcp_types import ElicitResult

from mlx_mcp.api.mcp import calls
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.models import Fetch
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from tests.api.mcp.test_long_calls import call, refusal
from tests.fakes import fake_client


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


@pytest.fixture
def real():
    """The engine with the embedded model."""
    client, _ = wire(Config.load())
    yield client
    assert client.close()


def connect(engine, **options):
    return Client(build_server(Service(engine, Registry(None))), **options)


async def loaded(client):
    return [model["name"] for model in (await call(client, "list_models"))["models"] if model["loaded"]]


async def test_a_model_is_loaded_and_unloaded_by_name(real):
    async with connect(real) as client:
        assert await loaded(client) == []
        made = await call(client, "load_model", model="embedded")
        assert (made["name"], made["loaded"], made["fits"]) == ("embedded", True, "yes")
        assert await loaded(client) == ["embedded"]
        freed = await call(client, "unload_model", model="embedded")
        assert freed["model"] == "embedded"
        assert await loaded(client) == []
        assert (await call(client, "unload_model", model="embedded"))["freed_mb"] == 0


async def test_the_name_of_a_model_that_is_nearly_right_is_suggested(real):
    async with connect(real) as client:
        for tool in ("load_model", "unload_model"):
            told = await refusal(client, tool, model="embed")
            assert "did you mean 'embedded'" in told.lower()
            assert "list_models" in told


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_download_is_begun_only_if_the_user_wants_it(engine, mode, monkeypatch):
    async def to_be_fetched(service, name):
        return Fetch("owner/large", 2_500_000_000, 5_000_000_000) if name == "other" else None

    answer, asked = ElicitResult(action="decline"), []

    async def user(context, params):
        asked.append(params.message)
        return answer

    monkeypatch.setattr(calls, "to_be_fetched", to_be_fetched)
    async with connect(engine, mode=mode, elicitation_callback=user) as client:
        for tool, rest in [("generate", {"prompt": "x"}), ("create_session", {"system": "x"}), ("load_model", {})]:
            told = await refusal(client, tool, model="other", **rest)
            assert "does not want owner/large to be downloaded. list_models says which are here" in told
        assert "2.5 GB; 5.0 GB are free" in asked[0]
        assert (await call(client, "generate", prompt="x", model="tiny"))["text"] == "x"
        assert len(asked) == 3
        answer = ElicitResult(action="accept", content={"go_ahead": True})
        assert (await call(client, "generate", prompt="x", model="other"))["text"] == "x"
    async with connect(engine, mode=mode) as client:  # a host that cannot ask: its user has named the model
        assert (await call(client, "generate", prompt="x", model="other"))["text"] == "x"
        assert len(asked) == 4
