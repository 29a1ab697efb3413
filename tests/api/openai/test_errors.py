"""Errors in OpenAI's form."""

import json

import pytest

from mlx_mcp.api.openai.errors import error_in_stream, refuse
from mlx_mcp.api.web.failure import Failure, failure_of
from mlx_mcp.errors import (
    CapacityError,
    EngineDead,
    GenerationFailed,
    InvalidRequest,
    ModelError,
    PromptTooLong,
    SessionBusy,
    StorageError,
    UnknownModel,
    UnknownReply,
    UnknownSession,
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (PromptTooLong(9, 9, 9), 400, "invalid_request_error", "context_length_exceeded", "messages"),
        (InvalidRequest("Say so."), 400, "invalid_request_error", None, None),
        (UnknownModel("x", []), 404, "invalid_request_error", "model_not_found", "model"),
        (UnknownReply("x"), 404, "invalid_request_error", "response_not_found", "response_id"),
        (UnknownSession("x"), 404, "invalid_request_error", "session_not_found", "session_id"),
        (SessionBusy("x"), 409, "conflict_error", "session_busy", "session_id"),
        (CapacityError("Full.", 3), 503, "server_error", "server_overloaded", None),
        (ModelError("Broken."), 503, "server_error", "model_unavailable", "model"),
        (EngineDead(), 503, "server_error", "engine_unavailable", None),
        (StorageError("Full."), 503, "server_error", None, None),
        (GenerationFailed("Broken."), 500, "server_error", None, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_error_has_its_status_type_and_code(error, status, kind, code, param):
    response = refuse(failure_of(error))
    told = {"message": str(error), "type": kind, "param": param, "code": code}
    assert (response.status_code, json.loads(response.body)) == (status, {"error": told})
    assert error_in_stream(error).sent() == {"error": told}


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, "authentication_error", "invalid_api_key"),
        (403, "permission_error", None),
        (413, "invalid_request_error", None),
        (429, "rate_limit_error", "rate_limit_exceeded"),
    ],
)
def test_refusals_by_status_have_a_type_too(status, kind, code):
    response = refuse(Failure(status, "No.", 1.2, "model"))
    told = json.loads(response.body)["error"]
    assert told == {"message": "No.", "type": kind, "param": "model", "code": code}
    assert response.headers["retry-after"] == "2"


def test_a_limit_that_the_engine_met_is_told_as_a_limit_where_its_status_says_so():
    told = json.loads(refuse(Failure(429, "Full.", 1.0, error=CapacityError("Full.", 1))).body)["error"]
    assert (told["type"], told["code"]) == ("rate_limit_error", "rate_limit_exceeded")
