"""A server with all APIs in this process, and Anthropic's own client for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic

from mlx_mcp.config import Config
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.hosting.faces import web_app
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.listener import listen
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.service import Service


@asynccontextmanager
async def serving(engine: EngineClient, registry: Registry | None = None, **settings: Any) -> AsyncIterator[str]:
    """A server on a free port of loopback; yields its address."""
    config = Config.load(port=0, **settings)
    listener = listen(config.host, config.port)
    server = HttpServer(web_app(Service(engine, registry or Registry(None)), Activity(), config), config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(20):
            while not server.started:
                await asyncio.sleep(0.001)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(20):
            await task


@asynccontextmanager
async def asking(
    engine: EngineClient, registry: Registry | None = None, max_retries: int = 0
) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Anthropic's client of such a server."""
    async with serving(engine, registry) as address:
        async with anthropic.AsyncAnthropic(base_url=address, api_key="none", max_retries=max_retries) as client:
            yield client
