"""All APIs on a free port of loopback, in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from mlx_mcp.config import Config
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.hosting.faces import web_app
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.listener import listen
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.jobs import Jobs
from mlx_mcp.service.service import Service


@contextlib.asynccontextmanager
async def all_apis(engine: EngineClient, **settings: Any) -> AsyncIterator[str]:
    """A server of an engine; yields its address."""
    config = Config.load(port=0, **settings)
    service = Service(engine, Registry(None), Jobs(config.result_ttl_s))
    listener = listen(config.host, config.port)
    server = HttpServer(web_app(service, Activity(), config), config)
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
