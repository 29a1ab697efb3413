"""The endpoints of Anthropic's Messages API."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.responses import JSONResponse, Response

from mlx_mcp.api.anthropic.answer_shapes import Answer, ErrorBody, ModelInfo, ModelPage, TokenCount
from mlx_mcp.api.anthropic.answer_shapes import Event as EventShape
from mlx_mcp.api.anthropic.errors import REQUEST_ID, body, refuse, request_id
from mlx_mcp.api.anthropic.shapes import CountRequest, MessagesRequest
from mlx_mcp.api.anthropic.translate import Told, told_by
from mlx_mcp.api.anthropic.writing import Event, Writer
from mlx_mcp.api.web.endpoint import Api, Asked, Endpoint
from mlx_mcp.api.web.events import encoded
from mlx_mcp.api.web.events import stream as stream_of
from mlx_mcp.api.web.failure import failure_of
from mlx_mcp.errors import InvalidRequest, MlxMcpError, UnknownModel
from mlx_mcp.service.activity import Meter
from mlx_mcp.service.count import count_tokens as count
from mlx_mcp.service.generate import Answered, stream
from mlx_mcp.service.models import Model, list_models, name_of
from mlx_mcp.service.values import Delta, Progress

VERSION = "anthropic-version"  # the header that tells this API from others with the same paths
CONVERSATION = "x-claude-code-session-id"  # the same for a window's main agent and all its sub-agents
PING_S = 5.0  # events are never further apart
MAX_LISTED, LISTED = 1000, 20  # models on a page
AS_JSON = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` makes an encoder for each event


async def create_message(asked: Asked) -> Response:
    """Answer messages, in one piece or as a stream of events."""
    request: MessagesRequest = asked.body
    told, name = told_by(request, lane_of(asked)), request_id()
    count_ignored(asked, told)
    if request.stream:
        response = await stream_of(events(asked, told, name))
        response.headers[REQUEST_ID] = name
        return response
    writer = Writer(told)
    async with aclosing(stream(asked.service, asked.caller, told.context, told.options)) as updates:
        async for update in updates:
            if isinstance(update, Delta):
                writer.add(update)
            elif isinstance(update, Answered):
                writer.finish(update)
                return JSONResponse(writer.whole(update), headers={REQUEST_ID: name})
    raise AssertionError("a generation ends with an answer or an error")


async def events(asked: Asked, told: Told, name: str) -> AsyncGenerator[bytes]:
    """The events of a message; an error before the first is raised, and a later one is the last event.

    The message begins once the engine reads the prompt, so that whatever refuses it has a status; or it waits for long.
    """
    writer, sent_at = Writer(told), time.monotonic()
    try:
        async with aclosing(stream(asked.service, asked.caller, told.context, told.options)) as updates:
            async for update in updates:
                made = events_of(asked, told, update, writer, silent_s=time.monotonic() - sent_at)
                if made:
                    yield as_sent(made)
                    sent_at = time.monotonic()
    except MlxMcpError as error:
        if not writer.started:
            raise
        yield as_sent([body(failure_of(error), name)])


def events_of(
    asked: Asked, told: Told, update: Progress | Delta | Answered, writer: Writer, silent_s: float
) -> list[Event]:
    """The events that an update of a generation makes, where none was for `silent_s` before it."""
    match update:
        case Answered():
            begun = [] if writer.started else writer.start(update.result.model, 0, 0)
            return [*begun, *writer.finish(update)]
        case Delta():
            return writer.add(update)
        case Progress(num_prompt=int(num_prompt)) if not writer.started:
            known = update.num_cached is not None
            if known or silent_s >= PING_S:
                model = name_of(asked.service, told.options.model)
                return writer.start(model, num_prompt if known else 0, update.num_cached or 0)
    return [{"type": "ping"}] if writer.started and silent_s >= PING_S else []


def as_sent(made: Sequence[Event]) -> bytes:
    """Events that come together, as a stream has them."""
    return b"".join(encoded(AS_JSON(event), event["type"]) for event in made)


async def count_tokens(asked: Asked) -> TokenCount:
    """Count the tokens of messages; the model is loaded if it is not."""
    request: CountRequest = asked.body
    told = told_by(request, lane_of(asked))
    count_ignored(asked, told)
    counted = await count(asked.service, asked.caller, told.context, told.options, untold)
    return TokenCount(input_tokens=counted.prompt_tokens)


async def models(asked: Asked) -> Response:
    """List the models that can be asked for, the default one first, by pages."""
    query = asked.request.query_params
    listed = [info(model) for model in await list_models(asked.service)]
    page = page_of(listed, query.get("limit", ""), query.get("after_id", ""), query.get("before_id", ""))
    return JSONResponse(page.model_dump(mode="json"), headers={REQUEST_ID: request_id()})


async def model(asked: Asked) -> Response:
    """Tell of one model, by its name or an alias."""
    wanted = asked.request.path_params["model_id"]
    known = await list_models(asked.service)
    found = next((m for m in known if wanted in (m.entry.spec.name, *m.entry.aliases)), None)
    if found is None:
        raise UnknownModel(wanted, [m.entry.spec.name for m in known])
    return JSONResponse(info(found).model_dump(mode="json"), headers={REQUEST_ID: request_id()})


def info(model: Model) -> ModelInfo:
    """What is told of a model."""
    name, tokens = model.entry.spec.name, model.entry.context_tokens
    return ModelInfo(id=name, display_name=name, max_input_tokens=tokens, max_tokens=tokens)


def page_of(infos: Sequence[ModelInfo], limit: str, after: str, before: str) -> ModelPage:
    """At most `limit` models, from right after one of them on, or up to right before one.

    Raises:
        InvalidRequest: the limit is none.
    """
    if limit and not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MAX_LISTED):
        raise InvalidRequest(f"limit is {limit[:80]!r}; it must be from 1 to {MAX_LISTED}.")
    most, ids = int(limit or LISTED), [each.id for each in infos]
    if before:
        end = ids.index(before) if before in ids else 0
        shown, more = infos[max(0, end - most) : end], end > most
    else:
        begin = ids.index(after) + 1 if after in ids else len(ids) if after else 0
        shown, more = infos[begin : begin + most], begin + most < len(ids)
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return ModelPage(data=list(shown), has_more=more, first_id=first, last_id=last)


def lane_of(asked: Asked) -> str:
    """Whose turn a call shares: that of its conversation in Claude Code, with all sub-agents."""
    conversation = asked.request.headers.get(CONVERSATION, "")[:200]
    return f"{asked.caller.tenant}/{conversation}" if conversation else ""


def count_ignored(asked: Asked, told: Told) -> None:
    """Count what of a request was ignored."""
    asked.service.observer.ignored.update(told.ignored)


async def untold(_: Sequence[Meter]) -> None:
    """Tell nobody how far a count is."""


API = Api(
    "Anthropic",
    (
        Endpoint(
            "POST",
            "/v1/messages",
            create_message,
            "Answer messages, in one piece or as a stream of events.",
            takes=MessagesRequest,
            gives=Answer,
            events=EventShape,
        ),
        Endpoint(
            "POST",
            "/v1/messages/count_tokens",
            count_tokens,
            "Count the tokens of messages, as the model would be given them.",
            takes=CountRequest,
            gives=TokenCount,
        ),
        Endpoint("GET", "/v1/models", models, "List the models.", gives=ModelPage, when=VERSION),
        Endpoint("GET", "/v1/models/{model_id:path}", model, "Tell of one model.", gives=ModelInfo, when=VERSION),
    ),
    refuse,
    ErrorBody,
)
