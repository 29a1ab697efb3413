"""Whatever is sent, the answer is one of OpenAI's, and never that the server failed."""

import json
import re
from contextlib import aclosing
from functools import cache

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from starlette.applications import Starlette

from mlx_mcp.api.openai.api import OPENAI
from mlx_mcp.api.openai.shared_shapes import ErrorAnswer
from mlx_mcp.api.web.endpoint import Serving, routes_of
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from tests.effort import drawn
from tests.fakes import fake_client

KEYS = sorted(
    {name for each in OPENAI.endpoints if each.takes for name in each.takes.model_fields}
    | {"role", "content", "type", "text", "function", "name", "arguments", "call_id", "tool_call_id", "json_schema"}
    | {"schema", "format", "effort", "image_url", "output", "id", "include_usage"}
)
WORDS = ["user", "assistant", "tool", "system", "function", "text", "message", "function_call", "json_schema", "tiny"]
WORDS += ["required", "auto", "{}", "low", "reasoning", "function_call_output", "none", "[", "\ud83d", "a" * 101, ""]
LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
USER = [{"role": "user", "content": "hi"}]
POSTS = {each.path: each for each in OPENAI.endpoints if each.method == "POST" and each.takes}
GOOD = {
    "/v1/chat/completions": {"model": "tiny", "messages": USER},
    "/v1/completions": {"model": "tiny", "prompt": "hi"},
    "/v1/responses": {"model": "tiny", "input": USER},
    "/v1/embeddings": {},
}


@pytest.fixture(scope="module")
def app():
    engine = fake_client()
    serving = Serving(Service(engine, Registry(None)), Activity(), FileReader((), 0, 0))
    yield Starlette(routes=routes_of([OPENAI], serving))
    engine.close()


async def answered(app, method, path, content=b""):
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=True)
    async with aclosing(httpx2.AsyncClient(transport=transport, base_url="http://x", verify=False)) as http:
        return await http.request(method, path, content=content)


@cache
def schema_of(shape):
    """What checks an answer against the shape that the OpenAPI document shows."""
    return Draft202012Validator(shape.model_json_schema(mode="serialization"))


def check(endpoint, response):
    """See that it is an answer of its shape, or one of OpenAI's errors that the caller could have avoided."""
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, response.text
        schema_of(ErrorAnswer).validate(response.json())
        assert response.json()["error"]["message"]
    elif response.headers["content-type"] == "application/json":
        schema_of(endpoint.gives).validate(response.json())
    else:
        *events, last = response.text.removesuffix("\n\n").split("\n\n")
        for event in events + [last] * (last != "data: [DONE]"):
            schema_of(endpoint.events).validate(json.loads(event.rpartition("data: ")[2]))


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud83d"}', b"NaN", b"1e999"],
)
async def test_a_body_that_is_no_object_is_refused(app, path, content):
    response = await answered(app, "POST", path, content)
    assert response.status_code == 400
    check(POSTS[path], response)


async def test_a_body_that_is_no_json_says_so(app):
    told = (await answered(app, "POST", "/v1/responses", b"{")).json()["error"]["message"]
    assert told.startswith("The body is not JSON: ")
    assert told.endswith("Send one JSON object.")


@pytest.mark.parametrize("path", POSTS)
@settings(max_examples=drawn(300, 20), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
async def test_any_members_get_an_answer_or_an_error_of_the_callers(app, path, data):
    names = st.sampled_from(sorted(POSTS[path].takes.model_fields))
    body = GOOD[path] | data.draw(st.dictionaries(names, VALUES, max_size=4))
    try:
        content = json.dumps(body).encode()
    except RecursionError:
        return
    response = await answered(app, "POST", path, content)
    check(POSTS[path], response)


ASKED = {
    "/v1/chat/completions": [
        {"n": 2, "temperature": 1, "logprobs": True, "top_logprobs": 1},
        {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True},
        {"messages": [{"role": "user", "content": "[h]a{look}"}], "stream": True},
        {"messages": [{"role": "user", "content": "[h]a{look}"}], "keep": True, "max_tokens": 3},
    ],
    "/v1/completions": [{"logprobs": 1}, {"stream": True, "logprobs": 1, "stream_options": {"include_usage": True}}],
    "/v1/responses": [
        {"input": "[h]a{look}", "metadata": {"a": "b"}, "instructions": "x", "reasoning": {"effort": "low"}},
        {"input": "[h]a{look}", "stream": True, "tools": [{"type": "function", "name": "look", "parameters": {}}]},
        {"max_output_tokens": 1, "stream": True},
        {"background": True},
    ],
}


@pytest.mark.parametrize(("path", "asked"), [(path, asked) for path, several in ASKED.items() for asked in several])
async def test_every_kind_of_answer_has_the_shape_that_is_documented(app, path, asked):
    response = await answered(app, "POST", path, json.dumps(GOOD[path] | asked).encode())
    assert response.status_code == 200, response.text
    check(POSTS[path], response)


async def test_what_is_shown_of_models_and_responses_has_its_shape_too(app):
    endpoints = {(each.method, each.path): each for each in OPENAI.endpoints}
    made = await answered(app, "POST", "/v1/responses", json.dumps(GOOD["/v1/responses"]).encode())
    ways = [("GET", "/v1/models", ""), ("GET", "/v1/models/{model:path}", "embedded")]
    ways += [("GET", "/v1/responses/{response_id}" + more, made.json()["id"]) for more in ("", "/input_items")]
    ways += [("DELETE", "/v1/responses/{response_id}", made.json()["id"])]
    for method, path, value in ways:
        response = await answered(app, method, re.sub(r"\{.*?\}", value, path))
        assert response.status_code == 200, response.text
        check(endpoints[method, path], response)
