"""An app over fakes, asked without a socket or on one, and its service."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2

from mlx_mcp.api.web.endpoint import Api
from mlx_mcp.config import Config
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.hosting.faces import web_app
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.listener import listen
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.service import Service


async def until(happened: Callable[[], object]) -> None:
    """Wait until something has happened that has no event."""
    async with asyncio.timeout(20):
        while not happened():
            await asyncio.sleep(0.005)


Watched = AsyncIterator[tuple[httpx2.AsyncClient, Service]]


@contextlib.asynccontextmanager
async def watched(engine: EngineClient, apis: tuple[Api, ...] | None = None, **settings: Any) -> Watched:
    """A client of an app without a socket, with the product's own APIs unless others are given; MCP needs a socket."""
    service = Service(engine, Registry(None))
    transport = httpx2.ASGITransport(app=web_app(service, Activity(), Config.load(**settings), apis))
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080", timeout=30) as http:
        yield http, service


@contextlib.asynccontextmanager
async def served(engine: EngineClient, apis: tuple[Api, ...] | None = None, **settings: Any) -> Watched:
    """A client of an app on a free port of loopback."""
    service, config = Service(engine, Registry(None)), Config.load(port=0, **settings)
    listener = listen(config.host, config.port)
    server = HttpServer(web_app(service, Activity(), config, apis), config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx2.AsyncClient(base_url=address, timeout=30) as http:
            yield http, service
    finally:
        server.hang_up()
        await task
