"""Streamable HTTP on a real socket, in this process over fakes, and as the real command."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.server.auth.provider import AccessToken
from mcp_types import ResourceListChangedNotification

from mlx_mcp.api.http.app import http_app
from mlx_mcp.api.mcp import changes
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError
from mlx_mcp.hosting.access import access_of
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.models.registry import Registry
from mlx_mcp.process.listener import listen
from mlx_mcp.service.service import Service
from tests.api.mcp.test_tools import generate, held
from tests.engine.test_client import until
from tests.fakes import fake_client

MODES = ["auto", "legacy"]


@contextlib.asynccontextmanager
async def serving(engine, verifier=None, **settings):
    """A server on a free port of loopback; yields its address. `verifier` knows who has which token."""
    config = Config.load(port=0, **settings)
    listener = listen(config.host, config.port)
    service = Service(engine, Registry(None))
    server = HttpServer(http_app(build_server(service), service, config, tokens=verifier or access_of(config)), config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(20):
            await task


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


@pytest.mark.parametrize("mode", MODES)
async def test_eight_calls_at_once_on_one_connection_each_get_their_own_answer(engine, mode):
    async with serving(engine) as address, Client(f"{address}/mcp", mode=mode) as client:
        results = await asyncio.gather(*(generate(client, f"text {i}") for i in range(8)))
    assert [r.structured_content["text"] for r in results] == [f"text {i}" for i in range(8)]


@pytest.mark.parametrize("mode", MODES)
async def test_errors_say_over_http_what_they_say_elsewhere(engine, mode):
    async with serving(engine) as address, Client(f"{address}/mcp", mode=mode) as client:
        for arguments, words in (({"model": "none"}, "Call list_models"), ({"prompt": "a" * 101}, "Shorten")):
            result = await generate(client, **arguments)
            assert result.is_error
            assert words in result.content[0].text
        engine.close()
        with pytest.raises(MCPError, match="restart the server"):
            await generate(client)


@pytest.mark.parametrize("mode", MODES)
async def test_progress_comes_over_http(engine, mode, monkeypatch):
    monkeypatch.setattr("mlx_mcp.service.jobs.QUIET_S", 0.0)
    seen = []

    async def show(progress, total, message):
        seen.append(message)

    async with serving(engine) as address, Client(f"{address}/mcp", mode=mode) as client:
        await client.call_tool("generate", {"prompt": "hello", "model": "tiny"}, progress_callback=show)
    assert seen


REQUESTS = {
    "modern": (
        {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": "generate"},
        {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        },
    ),
    "legacy": ({"mcp-protocol-version": "2025-11-25"}, {}),
}


async def legacy_session(http, address):
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    body = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
    response = await http.post(f"{address}/mcp", json=body)
    session = {"mcp-session-id": response.headers["mcp-session-id"]}
    note = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    await http.post(f"{address}/mcp", json=note, headers=session)
    return session


@pytest.mark.parametrize(("says", "who"), [(True, "test 1"), (False, "MCP curl/8.5.0")])
async def test_a_turn_was_asked_for_by_the_name_in_the_handshake_or_else_by_the_user_agent(engine, says, who):
    headers, meta = REQUESTS["modern"]
    named = {key: value for key, value in meta.items() if says or not key.endswith("clientInfo")}
    arguments = {"prompt": "abc", "model": "tiny", "keep": True}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    accept = {"accept": "application/json, text/event-stream", "user-agent": "curl/8.5.0 (x86_64)"}
    async with serving(engine) as address, httpx2.AsyncClient(headers=accept | headers, timeout=30) as http:
        params = {"name": "generate", "arguments": arguments, "_meta": named}
        answer = await http.post(f"{address}/mcp", json=body | {"params": params})
    assert answer.status_code == 200, answer.text
    [session] = await engine.sessions("")
    _, _, [origin] = await engine.transcript("", session.session_id)
    assert origin.who == who


@pytest.mark.parametrize("era", REQUESTS)
async def test_a_client_that_drops_its_connection_frees_its_row_within_a_step(engine, era):
    await held(engine)
    runner = engine.loader.runner
    headers, meta = REQUESTS[era]
    accept = {"accept": "application/json, text/event-stream"}
    async with serving(engine) as address, httpx2.AsyncClient(headers=accept, timeout=30) as http:
        session = await legacy_session(http, address) if era == "legacy" else {}
        params = {"name": "generate", "arguments": {"prompt": "abc", "model": "tiny", "max_tokens": 90}, "_meta": meta}
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        request = asyncio.create_task(http.post(f"{address}/mcp", json=body, headers=headers | session))
        await until(lambda: runner.steps or request.done())
        assert not request.done(), request.result().text
        request.cancel()  # closes the socket
        with contextlib.suppress(asyncio.CancelledError):
            await request
        await until(lambda: engine.thread._inbox)  # the cancel was sent while the step was still being computed
        runner.gate.set()
        await until(lambda: engine.stats.rows == engine.stats.running == 0)
        assert len(runner.steps) == 1
        async with Client(f"{address}/mcp") as client:
            assert (await generate(client, max_tokens=5)).structured_content["text"] == "hello"


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_that_cancels_frees_its_row_within_a_step(engine, mode):
    await held(engine)
    runner = engine.loader.runner
    async with serving(engine) as address, Client(f"{address}/mcp", mode=mode) as client:
        call = asyncio.create_task(generate(client, max_tokens=90))
        await until(lambda: runner.steps)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        await until(lambda: engine.thread._inbox)
        runner.gate.set()
        await until(lambda: engine.stats.rows == engine.stats.running == 0)
        assert len(runner.steps) == 1


async def test_health_says_what_runs_and_when_the_engine_is_gone(engine):
    async with serving(engine) as address, httpx2.AsyncClient() as http:
        async with Client(f"{address}/mcp") as client:
            await generate(client)
            await generate(client, keep=True)
        await until(lambda: engine.stats.prompt_tokens == 10)  # counts are those of the latest step that has ended
        sound = await http.get(f"{address}/health")
        assert (sound.status_code, sound.json()["status"], sound.json()["models"]) == (200, "ok", ["tiny"])
        counts = {name: sound.json()[name] for name in ("sessions", "prompt_tokens", "cached_tokens")}
        assert counts == {"sessions": 1, "prompt_tokens": 10, "cached_tokens": 5}
        assert sound.json()["cache_bytes"] > 0
        engine.close()
        dead = await http.get(f"{address}/health")
        assert (dead.status_code, dead.json()["status"]) == (503, "dead")


async def test_a_page_that_rebinds_its_name_is_kept_out(engine):
    body = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    async with serving(engine) as address, httpx2.AsyncClient() as http:
        host = await http.post(f"{address}/mcp", json=body, headers={"host": "evil.example"})
        origin = await http.post(f"{address}/mcp", json=body, headers={"origin": "http://evil.example"})
    assert (host.status_code, origin.status_code) == (421, 403)


async def test_with_a_token_only_those_who_have_it_get_in(engine):
    headers = {"authorization": "Bearer s3cret"}
    async with serving(engine, token="s3cret") as address, httpx2.AsyncClient() as http:
        body = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        ünï = {"authorization": "Bearer ünï".encode()}
        for wrong in ({}, {"authorization": "Bearer nope"}, {"authorization": "Basic s3cret"}, ünï):
            assert (await http.post(f"{address}/mcp", json=body, headers=wrong)).status_code == 401
        assert (await http.post(f"{address}/mcp?token=s3cret", json=body)).status_code == 401
        async with (
            httpx2.AsyncClient(headers=headers) as authorized,
            Client(streamable_http_client(f"{address}/mcp", http_client=authorized)) as client,
        ):
            assert (await generate(client)).structured_content["text"] == "hello"


class Callers:
    """Takes every token for the name of who sends it."""

    required, scopes, metadata_url = True, (), ""

    async def verify_token(self, token):
        return AccessToken(token=token, client_id=token, scopes=[], expires_at=None)


@pytest.mark.parametrize("mode", MODES)
async def test_sessions_and_cached_prompts_are_their_callers_alone(engine, mode):
    async def caller(name):
        http = await stack.enter_async_context(httpx2.AsyncClient(headers={"authorization": f"Bearer {name}"}))
        return await stack.enter_async_context(
            Client(streamable_http_client(f"{address}/mcp", http_client=http), mode=mode)
        )

    async with serving(engine, Callers()) as address, contextlib.AsyncExitStack() as stack:
        ann, bob = await caller("ann"), await caller("bob")
        prompt = "x" * 40
        session = (await generate(ann, prompt, keep=True)).structured_content["session"]
        assert (await generate(ann, prompt)).structured_content["cached_tokens"] > 0
        assert (await generate(bob, prompt)).structured_content["cached_tokens"] == 0
        assert "Session not found" in (await generate(bob, "y", session=session)).content[0].text
        assert (await bob.call_tool("list_sessions", {})).structured_content == {"sessions": []}
        assert (await bob.call_tool("close_session", {"all": True})).structured_content == {"closed": []}
        assert (await generate(ann, "y", session=session)).structured_content["text"] == "y"


async def test_a_message_longer_than_the_limit_is_refused_and_the_server_goes_on(engine):
    async with serving(engine, max_request_bytes=5000) as address, httpx2.AsyncClient() as http:
        response = await http.post(f"{address}/mcp", content=b"x" * 6000, headers={"content-type": "application/json"})
        assert response.status_code == 413
        async with Client(f"{address}/mcp") as client:
            assert (await generate(client)).structured_content["text"] == "hello"


def test_a_port_that_is_taken_says_so():
    with listen("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="Choose another with --port"):
        listen("127.0.0.1", listener.getsockname()[1])


async def test_the_real_command_serves_and_ends_on_sigterm_while_it_generates():
    # Alone: with other settings than an engine that is there it would say so first.
    arguments = [sys.executable, "-m", "mlx_mcp", "serve", "--standalone", "--http", "--port", "0"]
    server = subprocess.Popen(arguments, stderr=subprocess.PIPE, env=os.environ | {"MLX_MCP_SHUTDOWN_TIMEOUT_S": "1"})
    try:
        address = (await asyncio.to_thread(server.stderr.readline)).decode().split(" at ")[1].strip()
        async with Client(address, mode="legacy") as client:
            result = await client.call_tool("generate", {"prompt": "The code of Rex is 4096. What is the code of Rex?"})
            assert json.loads(json.dumps(result.structured_content))["text"] == "4096"
            endless = asyncio.create_task(client.call_tool("generate", {"prompt": "Count from 1 to 99."}))
            await asyncio.sleep(0)
            server.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.wait, 10) == 0
            endless.cancel()
            with contextlib.suppress(BaseException):
                await endless
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_hears_over_http_that_sessions_have_come(engine, mode, monkeypatch):
    monkeypatch.setattr(changes, "CHANGES_S", 0.01)
    heard = asyncio.Event()

    async def hear(message):
        if isinstance(getattr(message, "root", message), ResourceListChangedNotification):
            heard.set()

    async with serving(engine) as address, Client(f"{address}/mcp", mode=mode, message_handler=hear) as client:
        made = {"system": "Be short.", "model": "tiny"}
        if mode == "legacy":
            await client.call_tool("create_session", made)
            async with asyncio.timeout(20):
                while not heard.is_set():  # the stream that notifications come by may not be open yet
                    await client.call_tool("create_session", made)
                    await asyncio.sleep(0.05)
        else:
            async with client.listen(resources_list_changed=True) as events, asyncio.timeout(20):
                await client.call_tool("create_session", made)
                assert type(await anext(aiter(events))).__name__ == "ResourcesListChanged"
        assert len((await client.list_resources()).resources) > 3
