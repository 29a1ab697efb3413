"""Requests that take too long to arrive, or are too long, on a real socket."""

import asyncio
import contextlib
import json

import httpx2
import pytest

from mlx_mcp.api.http import arrival
from tests.api.http.test_http import serving
from tests.api.mcp.test_tools import held
from tests.engine.test_client import until
from tests.fakes import fake_client

HEAD = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
MODERN = {
    "accept": "application/json, text/event-stream",
    "mcp-protocol-version": "2026-07-28",
    "mcp-method": "tools/call",
    "mcp-name": "generate",
}
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


@contextlib.asynccontextmanager
async def connected(address):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()


async def said(reader):
    """What a connection says until its end, which comes."""
    heard = b""
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionResetError):
            while piece := await reader.read(65536):
                heard += piece
    return heard


async def trickle(writer, data):
    """A byte now and then, until nobody listens."""
    with contextlib.suppress(ConnectionError):
        for i in range(len(data)):
            writer.write(data[i : i + 1])
            await writer.drain()
            await asyncio.sleep(0.02)


SLOW = {
    "a head": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: ", b"x" * 10_000),
    "a body": (CHUNKED % b"/mcp", b"1\r\nx\r\n" * 10_000),
    "a body of a known length": (HEAD % b"/mcp" + b"content-length: 100000\r\n\r\n", b"x" * 10_000),
}


@pytest.mark.parametrize(("begin", "rest"), SLOW.values(), ids=SLOW)
async def test_what_comes_too_slowly_is_cut_however_steadily_it_comes(engine, begin, rest):
    async with serving(engine, request_timeout_s=0.3) as address, connected(address) as (reader, writer):
        writer.write(begin)
        slow = asyncio.create_task(trickle(writer, rest))
        heard = await said(reader)
        slow.cancel()
    assert heard.startswith(b"HTTP/1.1 408")
    assert b"The request did not arrive in time. Send it again." in heard


@pytest.mark.parametrize("route", [b"/health", b"/nowhere", b"/mcp"])
async def test_a_body_that_nobody_waits_for_does_not_hold_its_connection(engine, route):
    async with serving(engine, token="s3cret") as address, connected(address) as (reader, writer):
        writer.write(CHUNKED % route)  # answered before there is any of it: 405, 404, 401
        slow = asyncio.create_task(trickle(writer, b"1\r\nx\r\n" * 10_000))
        heard = await said(reader)
        slow.cancel()
    assert heard.startswith((b"HTTP/1.1 405", b"HTTP/1.1 404", b"HTTP/1.1 401"))


async def test_a_connection_that_says_nothing_is_ended(engine, monkeypatch):
    monkeypatch.setattr(arrival, "HEAD_S", 0.2)
    async with serving(engine) as address, connected(address) as (reader, _):
        assert await said(reader) == b""


async def test_the_second_request_of_a_connection_has_no_more_time_than_the_first(engine):
    async with serving(engine, request_timeout_s=0.3) as address, connected(address) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea")
        slow = asyncio.create_task(trickle(writer, b"l" * 10_000))
        heard = await said(reader)
        slow.cancel()
    assert heard.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in heard


async def test_an_answer_may_take_longer_than_a_request_may_take_to_arrive(engine):
    await held(engine)
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "generate", "_meta": META}}
    body["params"]["arguments"] = {"prompt": "abc", "model": "tiny", "max_tokens": 3}
    async with serving(engine, request_timeout_s=0.2) as address, httpx2.AsyncClient(timeout=30) as http:
        call = asyncio.create_task(http.post(f"{address}/mcp", json=body, headers=MODERN))
        await until(lambda: engine.loader.runner.steps)
        for _ in range(2):  # each is cut when its time is over; the call's was before
            async with connected(address) as (reader, writer):
                writer.write(b"GET /hea")
                await said(reader)
        assert not call.done()
        engine.loader.runner.gate.set()
        answer = (await call).json()
    assert answer["result"]["structuredContent"]["text"] == "abc"


@pytest.mark.parametrize("token", [None, "s3cret"])
async def test_a_long_body_is_refused_as_soon_as_it_is_too_long_and_the_connection_ends(engine, token):
    headers = HEAD % b"/mcp" + (b"authorization: Bearer s3cret\r\n" if token else b"")
    limit, piece = 1 << 16, b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    async with serving(engine, token=token, max_request_bytes=limit) as address, connected(address) as (reader, writer):
        writer.write(headers + b"transfer-encoding: chunked\r\n\r\n")
        hearing, sent = asyncio.create_task(said(reader)), 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20 and not hearing.done():
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
        heard = await hearing
    assert heard.startswith(b"HTTP/1.1 413")
    assert sent < 32 << 20  # what the system's buffers take, and no more


async def test_a_length_that_is_too_long_is_refused_before_any_of_it_comes(engine):
    async with serving(engine, max_request_bytes=1 << 16) as address, connected(address) as (reader, writer):
        writer.write(HEAD % b"/mcp" + b"content-length: 65537\r\n\r\n")
        assert (await said(reader)).startswith(b"HTTP/1.1 413")


async def test_a_body_of_just_the_limit_is_taken(engine):
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"}).encode()
    async with serving(engine, max_request_bytes=1 << 16) as address, httpx2.AsyncClient() as http:
        json_type = {"content-type": "application/json"}
        assert (await http.post(f"{address}/mcp", content=body.ljust(1 << 16), headers=json_type)).status_code != 413
        refused = await http.post(f"{address}/mcp", content=body.ljust((1 << 16) + 1), headers=json_type)
        assert (refused.status_code, refused.text) == (413, "The body is longer than 65536 bytes; send less.")
