"""Requests that schemathesis draws from the OpenAPI document, right ones and wrong ones, against all APIs over fakes.

Whatever is asked, the answer has a status, a media type and a shape that the document has for it.
"""

import asyncio
import threading
from contextlib import contextmanager

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from mlx_mcp.hosting.faces import APIS, document
from mlx_mcp.models.registry import Registry
from tests.api.http.routes import serving_all
from tests.effort import drawn
from tests.fakes import FakeLoader, FakeStore, fake_client

TOKEN = {"authorization": "Bearer s3cret"}
CASES = 6  # of each operation, at EFFORT 1; `make campaign` draws more than 5,000
CHECKED = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
CHAT = {"messages": [{"role": "user", "content": "[hm]Hello{call}"}], "max_tokens": 20}
# A body that each operation takes, if it needs one.
ENOUGH = {
    "/v1/sessions": {"system": "Be kind."},
    "/v1/sessions/{id}/generate": {"prompt": "[hm]Hello{call}"},
    "/v1/batch": {"prompts": ["Hello", "[hm]{call}"], "session": "known"},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "[hm]Hello{call}"},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": CHAT,
}
STREAMED = {path for path, methods in document()["paths"].items() if "text/event-stream" in str(methods)}
OPERATIONS = [each.ok() for each in schemathesis.openapi.from_dict(document()).get_all_operations()]


@contextmanager
def served():
    """A server on a thread of its own, and the models `embedded` on fakes."""
    engine = fake_client(FakeLoader(context_tokens=400), open_store=FakeStore)
    engine.registry = Registry(None)
    addresses, ready, end = [], threading.Event(), threading.Event()

    async def serve():
        async with serving_all(engine, APIS, token="s3cret") as address:
            addresses.append(address)
            ready.set()
            await asyncio.to_thread(end.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(20)
        yield addresses[0]
    finally:
        end.set()
        thread.join(20)
        engine.close()


@pytest.fixture(scope="module")
def http():
    with served() as address, httpx2.Client(base_url=address, headers=TOKEN, timeout=20) as client:
        yield client


def there(http, path, name):
    """Something that is there, for the part of a path of that name."""
    if name in ("name", "model"):
        return "embedded"
    http.post("/v1/sessions", json={"system": "Be kind. ", "name": "known"})
    if "results" in path:
        return http.post("/v1/sessions/known/generate", json={"prompt": "x", "wait_s": 0}).json()["result_id"]
    if "responses" in path:
        return http.post("/v1/responses", json={"input": "Hello"}).json()["id"]
    return "known"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_every_answer_is_documented(operation, http):
    drawing = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

    @settings(
        max_examples=drawn(CASES, 6),
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=drawing, data=st.data())
    def holds(case, data):
        for name in case.path_parameters or ():
            if data.draw(st.booleans()):
                case.path_parameters[name] = there(http, operation.path, name)
        if isinstance(case.body, dict) and data.draw(st.booleans()):  # what is drawn whole is taken seldom
            kept = data.draw(st.sets(st.sampled_from(sorted(case.body)), max_size=2)) if case.body else ()
            case.body = {name: case.body[name] for name in kept} | ENOUGH.get(operation.path, {})
            if operation.path in STREAMED and data.draw(st.booleans()):
                case.body["stream"] = True
        response = case.call(base_url=str(http.base_url), headers=TOKEN, timeout=20)
        refused = response.status_code in (503, 529) and "retry-after" in response.headers
        assert response.status_code < 500 or refused, response.text
        case.validate_response(response, checks=CHECKED)

    holds()
