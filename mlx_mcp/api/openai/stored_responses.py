"""GET, DELETE and cancel of /v1/responses/{id}, and its input items."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from mlx_mcp.api.openai.response_shapes import Deleted, InputItems, ItemsQuery
from mlx_mcp.api.openai.shape import answer
from mlx_mcp.api.web.endpoint import Asked
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.replies import Reply
from mlx_mcp.service.service import known_sessions
from mlx_mcp.service.storing import close


def found(asked: Asked) -> Reply:
    """The caller's response of the id in the path.

    Raises:
        UnknownReply: there is none.
    """
    reply_id = asked.request.path_params["response_id"]
    return asked.service.replies.get(asked.caller.tenant, reply_id, known_sessions(asked.service))


async def show_response(asked: Asked) -> Response:
    """Show a stored response, or how far one in the background is."""
    return answer(found(asked).answer)


async def delete_response(asked: Asked) -> Response:
    """Forget a response and close its session; responses that go on from it stay."""
    reply = found(asked)
    if reply.job is not None:
        asked.service.jobs.cancel(reply.job)
        await reply.job.ended.wait()
    asked.service.replies.forget(reply)
    await close(asked.service, reply)
    return answer(Deleted(id=reply.reply_id))


async def cancel_response(asked: Asked) -> Response:
    """End a response that runs in the background; one that has ended stays as it is."""
    reply = found(asked)
    if reply.job is None:
        raise InvalidRequest(
            "Only a response with background=true can be cancelled: close the connection that another one comes by."
        )
    asked.service.jobs.cancel(reply.job)
    await reply.job.ended.wait()
    return answer(reply.answer)


async def show_input_items(asked: Asked) -> Response:
    """List what was new in the request for a response."""
    query: ItemsQuery = asked.query
    items: list[dict[str, Any]] = found(asked).given
    items = items if query.order == "asc" else items[::-1]
    after = next((i + 1 for i, item in enumerate(items) if item["id"] == query.after), 0)
    page = items[after : after + query.limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return answer(InputItems(data=page, first_id=first, last_id=last, has_more=len(items) > after + query.limit))
