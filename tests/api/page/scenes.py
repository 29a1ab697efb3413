"""Servers in the states that the page is looked at in: nothing to do, much to do, an engine that has died."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from mlx_mcp.config import Config
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.core.steps import Step
from mlx_mcp.errors import MlxMcpError
from mlx_mcp.hosting.faces import web_app
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.listener import listen
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.service import Service
from mlx_mcp.service.sessions import create_session, fork_session
from tests.api.http.watched import until
from tests.fakes import FakeFlight, FakeLoader, FakeRunner, fake_client
from tests.service.house import asked, unheard

US = Caller()
STEP_S = 0.02


@dataclass
class PacedRunner(FakeRunner):
    """Takes its time for each step, as a model does, so that there is something to look at."""

    def launch(self, step: Step) -> FakeFlight:
        time.sleep(STEP_S)
        return super().launch(step)


@contextlib.asynccontextmanager
async def server(runner: FakeRunner | None = None, **settings: Any) -> AsyncIterator[tuple[str, Service]]:
    """A server on a free port of loopback: its address, and its service."""
    loader = FakeLoader(runner or FakeRunner(), context_tokens=8000, weights_bytes=640)
    engine = fake_client(loader, Limits(max_running=5), max_kv_bytes=120_000)
    service, config = Service(engine, Registry(None)), Config.load(port=0, **settings)
    listener = listen(config.host, config.port)
    http = HttpServer(web_app(service, Activity(), config), config)
    task = asyncio.create_task(http.serve(sockets=[listener]))
    try:
        await until(lambda: http.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        http.hang_up()
        await task
        engine.close()


@contextlib.asynccontextmanager
async def busy(service: Service, running: int = 5, waiting: int = 4) -> AsyncIterator[None]:
    """Twenty sessions in a tree, and calls that go on for the block: some run, and the others wait for a place."""
    for name, options in (("handbook", {"pinned": True}), ("notes", {"ephemeral": True}), ("ledger", {})):
        text = asked("|" + f"What the {name} says. " * 40)
        await create_session(service, US, text, "tiny", (), SessionOptions(name, **options), unheard)
    for parent, count, names in (
        ("handbook", 8, ["reviewer", "tester", "writer", "planner", "critic", "reader", "editor", "judge"]),
        ("planner", 3, ["planner.north", "planner.south", "planner.west"]),
        ("planner.north", 2, []),
        ("ledger", 4, []),
    ):
        await fork_session(service, US, parent, count, tuple(names), "")
    runner = service.engine.loader.runner  # type: ignore[attr-defined]  # a fake one
    runner.endless = True
    calls = [
        asyncio.create_task(go_on(service, name))
        for name in ["reviewer", "tester", "planner.south", "writer", "critic", "", "", "reader", ""][
            : running + waiting
        ]
    ]
    await until(lambda: service.engine.stats.running == running)
    try:
        yield
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def go_on(service: Service, session: str) -> None:
    """A call that goes on for as long as it may."""
    options = Options(model="" if session else "tiny", session=session, sampling=Sampling(max_tokens=5000))
    with contextlib.suppress(MlxMcpError):
        await generate(service, US, asked("Say it again. "), options, unheard)
