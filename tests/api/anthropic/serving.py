"""A server with all APIs in this process, and Anthropic's own client for it."""

import asyncio
from contextlib import asynccontextmanager

import anthropic

from mlx_mcp.config import Config
from mlx_mcp.hosting.faces import web_app
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.listener import listen
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.service import Service
from tests.engine.test_client import until


@asynccontextmanager
async def serving(engine, registry=None, **settings):
    """A server on a free port of loopback; yields its address."""
    config = Config.load(port=0, **settings)
    listener = listen(config.host, config.port)
    server = HttpServer(web_app(Service(engine, registry or Registry(None)), Activity(), config), config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(20):
            await task


@asynccontextmanager
async def asking(engine, registry=None, **settings):
    """Anthropic's client of such a server."""
    async with serving(engine, registry) as address:
        async with anthropic.AsyncAnthropic(
            base_url=address, api_key="none", **{"max_retries": 0} | settings
        ) as client:
            yield client
