"""What a principal has is its own: sessions, results, cached prompts. Two callers with a token each, over HTTP."""

import contextlib
import json
import re

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from mlx_mcp.api.mcp.tools import make_tools
from mlx_mcp.hosting.faces import APIS
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from tests.api.http.routes import serving_all
from tests.api.http.test_auth import bearer, tokens
from tests.api.mcp.test_tools import generate
from tests.fakes import FakeLoader, fake_client

__all__ = ["tokens"]
PROMPT = "x" * 40
# Each tool that takes a handle, with what else it is given; H stands for the handle.
WITH_HANDLES = {
    "generate": {"prompt": "y", "session": "H"},
    "generate_batch": {"prompts": ["y"], "session": "H"},
    "deliberate": {"task": "y", "session": "H"},
    "reason_over": {"question": "y", "session": "H"},
    "fork_session": {"session": "H"},
    "persist_session": {"session": "H"},
    "close_session": {"sessions": ["H"]},
    "count_tokens": {"prompt": "y", "session": "H"},
    "get_result": {"result_id": "H"},
    "cancel": {"result_id": "H"},
}


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


@contextlib.asynccontextmanager
async def two_callers(engine, tokens, mode="auto", **settings):
    async with serving_all(engine, **settings) as address, contextlib.AsyncExitStack() as stack:

        async def caller(name):
            http = await stack.enter_async_context(httpx2.AsyncClient(headers=bearer(tokens.add(name))))
            transport = streamable_http_client(f"{address}/mcp", http_client=http)
            return await stack.enter_async_context(Client(transport, mode=mode))

        yield await caller("ann"), await caller("bob")


def test_every_tool_with_a_handle_is_tested():
    tools = make_tools(Service(fake_client(), Registry(None)))
    named = {tool.name for tool in tools if {"session", "sessions", "result_id"} & set(tool.parameters["properties"])}
    assert named == set(WITH_HANDLES)


def filled(arguments, handle):
    return json.loads(json.dumps(arguments).replace('"H"', json.dumps(handle)))


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_foreign_handle_and_a_missing_one_are_answered_with_the_same_bytes(engine, tokens, mode):
    async with two_callers(engine, tokens, mode) as (ann, bob):
        made = (await generate(ann, PROMPT, keep=True)).structured_content["session"]
        named = "notes"
        await ann.call_tool("create_session", {"system": "s", "name": named, "model": "tiny"})
        running = await ann.call_tool("generate", {"prompt": "hello", "model": "tiny", "wait_s": 0})
        result_id = running.structured_content["result_id"]

        async def said(tool, handle):
            result = await bob.call_tool(tool, filled(WITH_HANDLES[tool], handle))
            assert result.is_error, (tool, handle)
            return result.model_dump_json().replace(handle, "H")

        for tool, arguments in WITH_HANDLES.items():
            foreign = [result_id] if "result_id" in arguments else [made, named]
            for handle in foreign:
                missing = handle[:-4] + "zzzz" if len(handle) > 8 else "zotes"
                assert await said(tool, handle) == await said(tool, missing)
        for uri in ("mlx://sessions/{}", "mlx://results/{}"):
            handle = made if "sessions" in uri else result_id
            texts = []
            for each in (handle, handle[:-4] + "zzzz"):
                with pytest.raises(MCPError) as raised:
                    await bob.read_resource(uri.format(each))
                texts.append(raised.value.error.model_dump_json().replace(each, "H"))
            assert texts[0] == texts[1]
        assert (await bob.call_tool("list_sessions", {})).structured_content == {"sessions": []}
        assert (await bob.call_tool("get_result", {})).structured_content.get("results", []) == []
        assert len((await ann.call_tool("list_sessions", {})).structured_content["sessions"]) == 2


async def test_two_principals_never_share_a_cached_token(engine, tokens):
    async with two_callers(engine, tokens) as (ann, bob):
        for i in range(6):
            prompt = chr(ord("a") + i) * 40
            await generate(ann, prompt, keep=True)
            assert (await generate(ann, prompt)).structured_content["cached_tokens"] > 0
            assert (await generate(bob, prompt)).structured_content["cached_tokens"] == 0


async def test_where_the_operator_says_so_principals_share_prefixes_and_nothing_else(tokens):
    engine = fake_client(FakeLoader(context_tokens=2000), block_tokens=16, share_prefixes=True)
    try:
        async with two_callers(engine, tokens) as (ann, bob):
            session = (await generate(ann, PROMPT, keep=True)).structured_content["session"]
            shared = (await generate(bob, PROMPT)).structured_content
            assert shared["cached_tokens"] > 0
            assert "Session not found" in (await generate(bob, "y", session=session)).content[0].text
            assert (await bob.call_tool("list_sessions", {})).structured_content == {"sessions": []}
            # What is told of a miss has words of an earlier prompt, which must not be another's.
            secret = "".join(map(chr, range(100, 200))) + "SECRET" + "".join(map(chr, range(200, 500)))
            await generate(ann, secret, max_tokens=1)
            for caller, told in ((bob, False), (ann, True)):
                near = secret.replace("SECRET", "______" if caller is bob else "++++++")
                result = await generate(caller, near, max_tokens=1)
                assert ("SECRET" in result.model_dump_json()) == told
    finally:
        engine.close()


# What is sent to a path with a handle in it, so that nothing but the handle is wrong; the others take no body.
BODIES = {"/generate": {"prompt": "y"}, "/fork": {}, "/persist": {}}
NO_HANDLES = ("/v1/models/", "/echo/")  # paths whose parameter is no handle


async def made_by(http, address):
    """A session's handle and name, a result's handle, and a stored response's, all of one caller."""
    sessions = [
        (await http.post(f"{address}/v1/sessions", json={"system": "s", "model": "tiny"} | more)).json()
        for more in ({}, {"name": "some-notes"})
    ]
    result = await http.post(f"{address}/v1/batch", json={"prompts": ["a"], "model": "tiny", "wait_s": 0})
    response = await http.post(f"{address}/v1/responses", json={"model": "tiny", "input": "hello"})
    return sessions[0]["session"], "some-notes", result.json()["result_id"], response.json()["id"]


async def test_over_plain_http_too_a_foreign_handle_and_a_missing_one_are_answered_with_the_same_bytes(engine, tokens):
    ends = [each for api in APIS for each in api.endpoints if "{" in each.path and not each.path.startswith(NO_HANDLES)]
    assert len(ends) >= 5
    async with serving_all(engine) as address, httpx2.AsyncClient(headers=bearer(tokens.add("bob"))) as bob:
        async with httpx2.AsyncClient(headers=bearer(tokens.add("ann"))) as ann:
            handles = await made_by(ann, address)
            before = (await ann.get(f"{address}/v1/sessions")).json()
            for end in ends:
                body = next((body for path, body in BODIES.items() if end.path.endswith(path)), None)
                for handle in handles:
                    said = []
                    for each in (handle, handle[:-4] + "zzzz"):
                        path = re.sub(r"\{[^}]*\}", each, end.path)
                        response = await bob.request(end.method, address + path, json=body)
                        said.append((response.status_code, response.text.replace(each, "H")))
                    assert said[0] == said[1], end.path
                    assert said[0][0] == 404, (end.path, said[0])
            after = (await ann.get(f"{address}/v1/sessions")).json()
            assert [each["session"] for each in after["sessions"]] == [each["session"] for each in before["sessions"]]
