"""Whatever is sent, the answer is one of OpenAI's, and never that the server failed."""

import json
from contextlib import aclosing

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_mcp.api.openai.api import ENDPOINTS, OPENAI
from mlx_mcp.api.web.endpoint import Serving, routes_of
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from tests.effort import drawn
from tests.fakes import fake_client

KEYS = sorted(
    {name for each in ENDPOINTS if each.takes for name in each.takes.model_fields}
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
POSTS = {each.path: each for each in ENDPOINTS if each.method == "POST" and each.takes}
GOOD = {
    "/v1/chat/completions": {"model": "tiny", "messages": USER},
    "/v1/completions": {"model": "tiny", "prompt": "hi"},
    "/v1/responses": {"model": "tiny", "input": USER},
    "/v1/embeddings": {},
}


@pytest.fixture(scope="module")
def app():
    from starlette.applications import Starlette

    engine = fake_client()
    serving = Serving(Service(engine, Registry(None)), Activity(), FileReader((), 0, 0))
    yield Starlette(routes=routes_of(OPENAI, serving))
    engine.close()


async def answered(app, method, path, content=b""):
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=True)
    async with aclosing(httpx2.AsyncClient(transport=transport, base_url="http://x")) as http:
        return await http.request(method, path, content=content)


def is_answer(response):
    """Whether it is an answer, or one of OpenAI's errors that the caller could have avoided."""
    if response.status_code == 200:
        return True
    told = response.json()["error"]
    return 400 <= response.status_code < 500 and set(told) == {"message", "type", "param", "code"} and told["message"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud83d"}', b"NaN", b"1e999"],
)
async def test_a_body_that_is_no_object_is_refused(app, path, content):
    response = await answered(app, "POST", path, content)
    assert response.status_code == 400
    assert is_answer(response)


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
    assert is_answer(response), (body, response.text)
