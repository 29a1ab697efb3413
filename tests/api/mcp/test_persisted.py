"""Through MCP, with the embedded model and a store: what is on disk is not deleted unless the user wants it."""

import pytest
from mcp import Client
from mcp_types import ElicitResult

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from tests.api.mcp.test_long_calls import call

SYSTEM = "Erin's badge is 77."


@pytest.fixture
def engine(tmp_path):
    client, _ = wire(Config.load(max_ssd_bytes=1 << 28, store_dir=tmp_path))
    yield client
    assert client.close()


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_persisted_session_is_deleted_only_if_the_user_wants_it(engine, mode):
    said, asked = ElicitResult(action="decline"), []

    async def user(context, params):
        asked.append(params.message)
        return said

    async with Client(build_server(Service(engine, Registry(None))), mode=mode) as client:
        await call(client, "create_session", system=SYSTEM, name="kept")
        await call(client, "persist_session", session="kept")
        refused = await client.call_tool("close_session", {"sessions": ["kept"]})
        assert "Ask your user, and call again with confirm=true" in refused.content[0].text
    async with Client(build_server(Service(engine, Registry(None))), mode=mode, elicitation_callback=user) as client:
        refused = await client.call_tool("close_session", {"sessions": ["kept"]})
        assert "no session was closed" in refused.content[0].text
        assert "kept" in asked[0]
        assert (await call(client, "list_sessions"))["sessions"][0]["name"] == "kept"
        said = ElicitResult(action="accept", content={"go_ahead": True})
        assert len((await call(client, "close_session", sessions=["kept"]))["closed"]) == 1
        await call(client, "create_session", system=SYSTEM, name="kept")
        await call(client, "persist_session", session="kept")
        assert len((await call(client, "close_session", sessions=["kept"], confirm=True))["closed"]) == 1
        assert len(asked) == 2
