"""Errors in OpenAI's form."""

from __future__ import annotations

from starlette.responses import Response

from mlx_mcp.api.openai.shape import answer
from mlx_mcp.api.openai.shared_shapes import ErrorAnswer, ErrorBody
from mlx_mcp.api.web.failure import Failure, failure_of
from mlx_mcp.errors import (
    CapacityError,
    EngineDead,
    MlxMcpError,
    ModelError,
    PromptTooLong,
    RequestTooLarge,
    SessionBusy,
    UnknownModel,
    UnknownReply,
    UnknownSession,
)

# The first class that an error belongs to says its code, and which member of the request is at fault.
CODES: tuple[tuple[type[MlxMcpError], str, str | None], ...] = (
    (PromptTooLong, "context_length_exceeded", "messages"),
    (RequestTooLarge, "context_length_exceeded", "messages"),
    (UnknownModel, "model_not_found", "model"),
    (UnknownReply, "response_not_found", "response_id"),
    (UnknownSession, "session_not_found", "session_id"),
    (SessionBusy, "session_busy", "session_id"),
    (CapacityError, "server_overloaded", None),
    (ModelError, "model_unavailable", "model"),
    (EngineDead, "engine_unavailable", None),
)
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
CODES_OF_STATUS = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def error_answer(failure: Failure) -> ErrorAnswer:
    """What is said of a failure."""
    known = (entry for entry in CODES if failure.status not in CODES_OF_STATUS and isinstance(failure.error, entry[0]))
    _, code, param = next(known, (None, CODES_OF_STATUS.get(failure.status), None))
    kind = TYPES.get(failure.status, "server_error" if failure.status >= 500 else "invalid_request_error")
    return ErrorAnswer(error=ErrorBody(message=failure.message, type=kind, param=failure.argument or param, code=code))


def refuse(failure: Failure) -> Response:
    """The response that tells of a failure."""
    response = answer(error_answer(failure), failure.status)
    response.headers.update(failure.headers)
    return response


def error_in_stream(error: MlxMcpError) -> ErrorAnswer:
    """What is said of an error when an answer has begun."""
    return error_answer(failure_of(error))
