"""Every route over HTTP, those of APIs that come later too: what holds for all of them is tested over this list."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from mlx_mcp.api.web.endpoint import Api, Asked, Endpoint
from mlx_mcp.api.web.failure import Failure
from mlx_mcp.chat.message import Message
from mlx_mcp.config import Config
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.hosting.faces import APIS, web_app
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.listener import listen
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.limits import Limiter
from mlx_mcp.service.service import Service
from tests.engine.test_client import until


class Said(BaseModel):
    """A prompt, or an answer."""

    text: str


async def echo(asked: Asked) -> BaseModel:
    """What the engine answers."""

    async def unheard(_: Any) -> None:
        pass

    context = Context(messages=(Message("user", asked.body.text),))
    return Said(text=(await generate(asked.service, asked.caller, context, Options("tiny"), unheard)).result.text)


def refuse(failure: Failure) -> Response:
    """An error form that no other API has."""
    return JSONResponse({"oops": failure.message}, failure.status, headers=failure.headers)


# An API as small as one can be; it stands for all where nothing of any of them matters.
ECHO = Api("echo", (Endpoint("POST", "/echo/{name}", echo, "Echo a text.", takes=Said, gives=Said),), refuse)


def routes(apis: Sequence[Api] = (*APIS, ECHO)) -> list[tuple[str, str]]:
    """Method and path of each route that needs a token where one is required."""
    own = [("GET", "/health"), ("POST", "/mcp"), ("GET", "/mcp"), ("DELETE", "/mcp"), ("GET", "/nowhere")]
    theirs = [(each.method, re.sub(r"\{[^}]*\}", "x", each.path)) for api in apis for each in api.endpoints]
    return own + sorted(set(theirs))


@contextlib.asynccontextmanager
async def serving_all(
    engine: EngineClient, apis: Sequence[Api] = (*APIS, ECHO), limits: Limiter | None = None, **settings: Any
) -> AsyncGenerator[str]:
    """A server of everything on a free port of loopback; yields its address."""
    config = Config.load(port=0, **settings)
    listener = listen(config.host, config.port)
    activity, service = Activity(), Service(engine, Registry(None), limits=limits or Limiter())
    server = HttpServer(web_app(service, activity, config, apis), config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.hang_up()
        async with asyncio.timeout(20):
            await task
