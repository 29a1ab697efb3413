"""Every route over HTTP, those of APIs that come later too: what holds for all of them is tested over this list."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, Response

from mlx_mcp.api.web.endpoint import Api, Asked, Endpoint
from mlx_mcp.api.web.events import stream
from mlx_mcp.api.web.failure import Failure
from mlx_mcp.chat.message import Message
from mlx_mcp.config import Config
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.engine.requests import Delta
from mlx_mcp.hosting.faces import APIS, web_app
from mlx_mcp.hosting.http import HttpServer, drain_http
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.listener import listen
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.generate import stream as stream_answer
from mlx_mcp.service.limits import Limiter
from mlx_mcp.service.service import Service


class Oops(BaseModel):
    """An error."""

    oops: str


class Said(BaseModel):
    """A prompt, or an answer."""

    text: str
    max_tokens: int = 512
    width: int = 1  # how often each piece of an answer is repeated


async def echo(asked: Asked) -> BaseModel:
    """What the engine answers."""

    async def unheard(_: Any) -> None:
        pass

    context = Context(messages=(Message("user", asked.body.text),))
    return Said(text=(await generate(asked.service, asked.caller, context, Options("tiny"), unheard)).result.text)


async def echo_events(asked: Asked) -> Response:
    """The same as it comes."""

    async def events() -> AsyncGenerator[ServerSentEvent]:
        context = Context(messages=(Message("user", asked.body.text),))
        options = Options("tiny", sampling=Sampling(max_tokens=asked.body.max_tokens))
        async with aclosing(stream_answer(asked.service, asked.caller, context, options)) as updates:
            async for update in updates:
                yield ServerSentEvent(update.text * asked.body.width if isinstance(update, Delta) else "progress")

    return await stream(events())


def refuse(failure: Failure) -> Response:
    """An error form that no other API has."""
    return JSONResponse({"oops": failure.message}, failure.status, headers=failure.headers)


# An API as small as one can be; it stands for all where nothing of any of them matters.
ECHO = Api(
    "echo",
    (
        Endpoint("POST", "/echo/{name}", echo, "Echo a text.", takes=Said, gives=Said),
        Endpoint("POST", "/echo/{name}/events", echo_events, "Echo a text as it comes.", takes=Said),
    ),
    refuse,
    Oops,
)


def routes(apis: Sequence[Api] = (*APIS, ECHO)) -> list[tuple[str, str]]:
    """Method and path of each route that needs a token where one is required."""
    own = [("POST", "/mcp"), ("GET", "/mcp"), ("DELETE", "/mcp"), ("GET", "/nowhere")]
    own += [("GET", path) for path in ("/health", "/health/ready", "/health/startup", "/metrics", "/page/state")]
    own += [("GET", "/openapi.json")]
    theirs = [(each.method, plain_path(each.path)) for api in apis for each in api.endpoints]
    return own + sorted(set(theirs))


def posted_paths(apis: Sequence[Api] = (*APIS, ECHO)) -> list[str]:
    """The paths that are posted to, whether a body is needed there or not."""
    theirs = [plain_path(each.path) for api in apis for each in api.endpoints if each.method == "POST"]
    return ["/mcp", *sorted(set(theirs))]


def plain_path(path: str) -> str:
    """A path with something in place of its parameters."""
    return re.sub(r"\{[^}]*\}", "x", path)


@contextlib.asynccontextmanager
async def serving_all(
    engine: EngineClient,
    apis: Sequence[Api] = (*APIS, ECHO),
    limits: Limiter | None = None,
    drained: bool = False,
    **settings: Any,
) -> AsyncGenerator[str]:
    """A server of everything on a free port of loopback; yields its address. If `drained`, it ends as real ones do."""
    config = Config.load(port=0, **settings)
    listener = listen(config.host, config.port)
    activity, service = Activity(), Service(engine, Registry(None), limits=limits or Limiter())
    server = HttpServer(web_app(service, activity, config, apis), config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        async with asyncio.timeout(20):
            if drained:
                await drain_http(server, activity, config.shutdown_timeout_s)
            server.hang_up()
            await task
