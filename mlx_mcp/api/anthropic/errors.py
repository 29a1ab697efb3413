"""Errors as Anthropic's API has them."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.responses import JSONResponse, Response

from mlx_mcp.api.anthropic.answer_shapes import ErrorBody, ErrorDetail
from mlx_mcp.api.web.failure import Failure
from mlx_mcp.errors import CapacityError, PromptTooLong

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
OVERLOADED = 529  # Anthropic's own status for a server that is full
REQUEST_ID = "request-id"  # the header that their SDKs show with an error


def request_id() -> str:
    """A name for a request, by which its error can be talked about."""
    return f"req_{secrets.token_hex(12)}"


def refuse(failure: Failure) -> Response:
    """The response that is a failure."""
    name = request_id()
    return JSONResponse(body(failure, name), status(failure), {**failure.headers, REQUEST_ID: name})


def status(failure: Failure) -> int:
    """The status of a failure: what is full for now is overloaded, and what is broken is not."""
    full = failure.status == 503 and isinstance(failure.error, CapacityError)
    return OVERLOADED if full else failure.status


def body(failure: Failure, name: str) -> dict[str, Any]:
    """The failure's JSON, which is also the data of a stream's last event."""
    error, text = failure.error, failure.message
    if isinstance(error, PromptTooLong):
        # By these words Claude Code knows that it has to make the conversation shorter.
        text = f"prompt is too long: {error.prompt_tokens} tokens > {error.context_tokens} maximum. {text}"
    kind = KINDS.get(status(failure), "api_error")
    return ErrorBody(error=ErrorDetail(type=kind, message=text), request_id=name).model_dump()
