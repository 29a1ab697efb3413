"""A small API over plain HTTP, for tests of what all of them share: POST /small/generate, whole or streamed."""

from collections.abc import AsyncGenerator

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from mlx_mcp.api.web.endpoint import Api, Asked, Endpoint
from mlx_mcp.api.web.events import encoded
from mlx_mcp.api.web.events import stream as stream_of
from mlx_mcp.api.web.failure import Failure
from mlx_mcp.chat.message import Message
from mlx_mcp.engine.requests import Delta
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Answered, Options, generate, stream
from tests.service.house import unheard


class Ask(BaseModel):
    prompt: str
    model: str = "tiny"
    stream: bool = False


class Said(BaseModel):
    text: str


class Problem(BaseModel):
    problem: str


async def answer(asked: Asked) -> Said | Response:
    body: Ask = asked.body
    context, options = Context("", (), (Message("user", body.prompt),)), Options(model=body.model)
    if body.stream:
        return await stream_of(events(asked, context, options))
    return Said(text=(await generate(asked.service, asked.caller, context, options, unheard)).result.text)


async def events(asked: Asked, context: Context, options: Options) -> AsyncGenerator[bytes]:
    async for update in stream(asked.service, asked.caller, context, options):
        if isinstance(update, Delta):
            yield encoded(update.text)
        elif isinstance(update, Answered):
            yield encoded(update.result.text, "end")


def refuse(failure: Failure) -> Response:
    return JSONResponse(Problem(problem=failure.message).model_dump(), failure.status, failure.headers)


SMALL = Api("small", (Endpoint("POST", "/small/generate", answer, "Answer a prompt.", Ask, Said),), refuse, Problem)
