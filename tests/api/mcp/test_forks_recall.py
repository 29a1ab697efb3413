"""Through MCP, with the embedded model: ten forks of one session, and a cache that never stops evicting."""

import asyncio

import pytest
from mcp import Client

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.engine import Engine, EngineOptions
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.mlx_backend.loader import MlxLoader
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service

NAMES = "Alice Bob Carol Dave Erin Frank Grace Henry Iris Jack".split()
COLORS = "red blue green yellow purple orange black white brown pink".split()
SHARED = " ".join(
    ["The deploy code is 4096. Zoe has the pet parrot. The launch room is 217."]
    + [f"The {place}'s number is {i * 37 % 900 + 100}." for i, place in enumerate("vault garden office tower".split())]
)


ROOMY = pytest.param(1 << 30, id="roomy", marks=pytest.mark.long)


@pytest.mark.parametrize("max_kv_bytes", [pytest.param(4 << 20, id="evicting"), ROOMY])
async def test_ten_forks_each_recall_their_own_fact_and_the_parents(max_kv_bytes):
    loader = MlxLoader()
    limits = Limits(max_running=8)
    thread = EngineThread(lambda: Engine(loader, limits, 1 << 30, max_kv_bytes, EngineOptions()))
    client = EngineClient(thread, Registry(None), loader)
    try:
        async with Client(build_server(Service(client, Registry(None)))) as host:

            async def call(tool, **arguments):
                return (await host.call_tool(tool, arguments)).structured_content

            parent = (await call("create_session", system=SHARED))["session"]
            forks = (await call("fork_session", session=parent, count=10))["sessions"]

            async def live(fork, name, color):
                told = await call("generate", session=fork, prompt=f"{name}'s color is {color}.")
                own = await call("generate", session=fork, prompt=f"What is {name}'s color?")
                parents = await call("generate", session=fork, prompt="What is the deploy code?")
                assert told["session"] == own["session"] == parents["session"] == fork
                return own["text"].strip(), parents["text"].strip()

            for _ in range(2):
                answers = await asyncio.gather(*(live(*f) for f in zip(forks, NAMES, COLORS, strict=True)))
                assert answers == [(color, "4096") for color in COLORS]
            again = await call("generate", session=parent, keep=False, prompt="What is Zoe's pet?")
            assert again["text"].strip() == "parrot"
        assert (thread.stats.evictions > 50) == (max_kv_bytes < 1 << 30)
    finally:
        assert client.close()
