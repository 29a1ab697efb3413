"""Bodies and Accept headers at /mcp, in both protocol eras, on a real socket."""

import json
import logging

import httpx2
import pytest

from mlx_mcp.api.http.messages import JsonOnly
from tests.api.http.test_arrival import META, MODERN
from tests.api.http.test_http import legacy_session, serving
from tests.fakes import fake_client

ERAS = ["modern", "legacy"]


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


async def headers_of(era, http, address, method="ping"):
    """What a client of an era sends with each request."""
    if era == "modern":
        return MODERN | {"mcp-method": method}
    session = await legacy_session(http, address)
    return session | {"mcp-protocol-version": "2025-11-25", "accept": MODERN["accept"]}


def request(id_=1, method="tools/list", **params):
    return {"jsonrpc": "2.0", "id": id_, "method": method, "params": params | {"_meta": META}}


NO_ID = "must be a string or an integer, not"
NO_MESSAGE = "The body must be one JSON-RPC message"
NO_JSON = "Send one JSON-RPC message"
NO_VERSION = 'must have "jsonrpc": "2.0"'
BODIES = {
    "null id": (request(None), None, -32600, NO_ID),
    "fraction": (request(1.5), None, -32600, NO_ID),
    "whole fraction": (b'{"jsonrpc": "2.0", "id": 1.0, "method": "ping"}', None, -32600, NO_ID),
    "true": (request(True), None, -32600, NO_ID),
    "list": (request([1]), None, -32600, NO_ID),
    "object": (request({}), None, -32600, NO_ID),
    "long id": (request(["x" * 100_000]), None, -32600, NO_ID),
    "null id of a call": (request(None, "tools/call", name="list_models", arguments={}), None, -32600, NO_ID),
    "null id of an answer": ({"jsonrpc": "2.0", "id": None, "result": {}}, None, -32600, NO_ID),
    "batch": ([request(1)], None, -32600, NO_MESSAGE),
    "empty batch": ([], None, -32600, NO_MESSAGE),
    "string": ("ping", None, -32600, NO_MESSAGE),
    "number": (5, None, -32600, NO_MESSAGE),
    "null": (b"null", None, -32600, NO_MESSAGE),
    "empty": (b"", None, -32700, NO_JSON),
    "no JSON": (b"{", None, -32700, NO_JSON),
    "no UTF-8": (b'{"\xff": 1}', None, -32700, NO_JSON),
    "deep": (b"[" * 100_000, None, -32700, NO_JSON),
    "no method": ({"jsonrpc": "2.0", "id": 7}, 7, -32600, "The request has no method; send one"),
    "no text for a method": (
        {"jsonrpc": "2.0", "id": 7, "method": 5},
        7,
        -32600,
        "The method of a request must be a string",
    ),
    "no version": ({"id": "a", "method": "ping"}, "a", -32600, NO_VERSION),
    "other version": ({"jsonrpc": "1.0", "id": 7, "method": "ping"}, 7, -32600, NO_VERSION),
    "half a surrogate": (b'{"id": "\\ud83d", "method": "ping"}', "\ud83d", -32600, NO_VERSION),
    "list of params": (
        {"jsonrpc": "2.0", "id": 7, "method": "ping", "params": [1]},
        7,
        -32602,
        "The params of a request must be an object",
    ),
}


@pytest.mark.parametrize("era", ERAS)
async def test_a_body_that_is_no_sound_message_is_answered_with_an_error_and_the_server_goes_on(engine, era):
    async with serving(engine) as address, httpx2.AsyncClient(timeout=30) as http:
        headers = await headers_of(era, http, address, "tools/list")
        for name, (body, id_, code, words) in BODIES.items():
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            as_json = headers | {"content-type": "application/json"}
            response = await http.post(f"{address}/mcp", content=content, headers=as_json)
            answer = response.json()
            assert (name, response.status_code, answer["id"]) == (name, 400, id_)
            assert (name, answer["error"]["code"]) == (name, code)
            assert words in answer["error"]["message"]
            assert answer["jsonrpc"] == "2.0"
        note = {"jsonrpc": "2.0", "method": "notifications/initialized", "params": None}
        assert (await http.post(f"{address}/mcp", json=note, headers=headers)).status_code == 202
        for id_ in (0, -5, 2**60, "", "a", "1.5"):
            response = await http.post(f"{address}/mcp", json=request(id_), headers=headers)
            assert response.status_code == 200
            assert '"tools"' in response.text


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("application/json", "application/json"),
        ("application/json;q=0.9, text/html", "application/json"),
        ("text/event-stream", None),
        ("application/*", "application/json"),
        ("*/*", None),
        (None, None),
    ],
)
async def test_who_accepts_one_of_the_two_types_is_answered_and_in_json_if_it_takes_nothing_else(
    engine, era, accept, media_type
):
    async with serving(engine) as address, httpx2.AsyncClient(timeout=30) as http:
        headers = await headers_of(era, http, address, "tools/call")
        del headers["accept"]
        call = request(1, "tools/call", name="generate", arguments={"prompt": "hello", "model": "tiny"})
        call["params"]["_meta"] = META | {"progressToken": 5}  # there are events before the answer
        asked = http.build_request("POST", f"{address}/mcp", json=call, headers=headers)
        del asked.headers["accept"]
        if accept is not None:
            asked.headers["accept"] = accept
        response = await http.send(asked)
    assert response.status_code == 200
    assert "hello" in response.text
    if media_type is not None:
        assert response.headers["content-type"] == media_type
        assert response.json()["result"]["structuredContent"]["text"] == "hello"
        assert response.json()["id"] == 1


@pytest.mark.parametrize("era", ERAS)
async def test_who_accepts_neither_type_is_refused(engine, era):
    async with serving(engine) as address, httpx2.AsyncClient() as http:
        headers = await headers_of(era, http, address, "tools/list") | {"accept": "text/html"}
        assert (await http.post(f"{address}/mcp", json=request(), headers=headers)).status_code == 406


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    ("method", "params", "codes"),
    [
        ("prompts/get", {"name": "nobody"}, {"modern": -32602, "legacy": -32602}),
        ("resources/read", {"uri": "mlx://nobody"}, {"modern": -32602, "legacy": -32002}),
        ("completion/complete", {"ref": {}, "argument": {}}, {"modern": -32602, "legacy": -32602}),
        ("no/such", {}, {"modern": -32601, "legacy": -32601}),
    ],
)
async def test_what_is_unknown_is_answered_with_its_code_and_leaves_no_traceback_in_the_log(
    engine, caplog, era, method, params, codes
):
    caplog.set_level(logging.WARNING)
    async with serving(engine) as address, httpx2.AsyncClient() as http:
        headers = await headers_of(era, http, address, method) | {"accept": "application/json"}
        if era == "modern":
            headers["mcp-name"] = params.get("name") or params.get("uri") or ""
        response = await http.post(f"{address}/mcp", json=request(1, method, **params), headers=headers)
    assert response.json()["error"]["code"] == codes[era]
    assert [record for record in caplog.records if record.exc_info] == []


async def test_a_client_may_say_that_it_could_not_read_something(engine):
    async with serving(engine) as address, httpx2.AsyncClient() as http:
        headers = await headers_of("legacy", http, address)
        told = {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "it was no JSON"}}
        assert (await http.post(f"{address}/mcp", json=told, headers=headers)).status_code == 202


async def test_a_response_that_ends_without_an_answer_is_an_error_that_says_to_call_again():
    sent = []

    async def send(message):
        sent.append(message)

    only = JsonOnly(send)
    headers = [(b"content-type", b"text/event-stream")]
    await only.send({"type": "http.response.start", "status": 200, "headers": headers})
    await only.send({"type": "http.response.body", "body": b": ping\r\n\r\n", "more_body": True})
    await only.send({"type": "http.response.body", "body": b""})
    assert dict(sent[0]["headers"])[b"content-type"] == b"application/json"
    error = json.loads(sent[1]["body"])["error"]
    assert error == {"code": -32603, "message": "The call ended without an answer. Call again."}
