"""Servers on loopback in this process, and OpenAI's own clients of them."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx2
from openai import AsyncOpenAI
from starlette.applications import Starlette

from mlx_mcp.api.openai.api import OPENAI
from mlx_mcp.api.web.endpoint import Serving, routes_of
from mlx_mcp.config import Config
from mlx_mcp.core.steps import Step
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.listener import listen
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from tests.fakes import FakeFlight, FakeLoader


@asynccontextmanager
async def serving(engine: EngineClient, service: Service | None = None) -> AsyncIterator[str]:
    """A server of OpenAI's API alone, on a free port of loopback; yields its address."""
    config = settings()
    listener = listen(config.host, config.port)
    serving = Serving(service or Service(engine, Registry(None)), Activity(), FileReader((), 0, 0))
    server = HttpServer(Starlette(routes=routes_of([OPENAI], serving)), config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(10):
            while not server.started:
                await asyncio.sleep(0.001)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(20):
            await task


@asynccontextmanager
async def client_of(engine: EngineClient, service: Service | None = None, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client of such a server; it retries nothing unless it is told to."""
    given: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 30.0}
    async with (
        serving(engine, service) as address,
        AsyncOpenAI(base_url=f"{address}/v1", http_client=http_client(), **given | options) as client,
    ):
        yield client


def http_client() -> httpx2.AsyncClient:
    """A client of HTTP that reads no certificates, which takes longer than a test."""
    return httpx2.AsyncClient(verify=False)


@cache
def settings() -> Config:
    """The settings of all these servers."""
    return Config.load(port=0)


def user(text: str) -> list[Any]:
    """A chat of one message."""
    return [{"role": "user", "content": text}]


def pause_after(engine: EngineClient, num_steps: int) -> threading.Event:
    """Have the fake model stop before a step; returns what lets it go on."""
    loader = engine.loader
    assert isinstance(loader, FakeLoader), "a fake is behind it"
    runner = loader.runner
    launch = runner.launch

    def paused(step: Step) -> FakeFlight:
        if len(runner.steps) == num_steps:
            runner.gate.clear()
        return launch(step)

    runner.launch = paused  # type: ignore[method-assign]  # of this one
    return runner.gate
