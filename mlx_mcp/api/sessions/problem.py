"""How this API says that something went wrong: problem details as RFC 9457 has them.

Chosen over an `error` object of our own: the media type alone tells a failure from an answer, HTTP libraries have types
for it, and an error in a stream or in a result that is fetched later has the same form.
"""

from __future__ import annotations

import re
from http import HTTPStatus

from pydantic import BaseModel
from starlette.responses import Response

from mlx_mcp.api.web.failure import Failure

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """Why a call has no answer: `detail` says what to do, and `code` is a word for programs."""

    title: str
    status: int
    detail: str
    code: str
    argument: str | None = None  # the one that is at fault, where that is known
    retry_after_s: float | None = None  # the same call may succeed then


def problem(failure: Failure) -> Problem:
    """A failure in this form."""
    kind = "InvalidRequest" if failure.error is None and failure.status == 400 else type(failure.error).__name__
    title = HTTPStatus(failure.status).phrase
    return Problem(
        title=title,
        status=failure.status,
        detail=failure.message,
        code=snake_case(title.replace(" ", "") if kind == "NoneType" else kind),
        argument=failure.argument or None,
        retry_after_s=failure.retry_after_s,
    )


def refuse(failure: Failure) -> Response:
    """The response to a call that fails."""
    body = problem(failure).model_dump_json(exclude_none=True)
    return Response(body, failure.status, failure.headers, MEDIA_TYPE)


def snake_case(name: str) -> str:
    """The name of a class as programs compare it, such as `unknown_session`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
