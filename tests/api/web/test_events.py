"""Streams of events: what is written, when a comment is, and how a stream ends."""

import asyncio
from contextlib import suppress
from typing import Any

import anyio
import pytest

from mlx_mcp.api.web import events as subject
from mlx_mcp.api.web.events import PING, encoded, stream
from mlx_mcp.errors import GenerationFailed

SCOPE = {"type": "http", "method": "POST"}


class Client:
    """The other end of one response."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.start: dict[str, Any] | None = None
        self.ended = False
        self.left = asyncio.Event()
        self.reads = asyncio.Event()  # whether it reads what is sent
        self.reads.set()
        self.heard = asyncio.Condition()
        self.num_looks = 0  # how often it was looked whether it has left, or whether a comment is due

    async def receive(self):
        async with self.heard:
            self.num_looks += 1
            self.heard.notify_all()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.reads.wait()
        assert not self.ended, "something is sent after the end"
        if message["type"] == "http.response.body":
            assert self.start is not None, "something is sent before the head"
            self.ended = not message["more_body"]
            async with self.heard:
                self.bodies.append(message["body"])
                self.heard.notify_all()
        else:
            self.start = message

    async def until(self, holds):
        async with asyncio.timeout(10), self.heard:
            await self.heard.wait_for(holds)

    async def hears(self, num):
        await self.until(lambda: len(self.bodies) >= num)


class Source:
    """Events that a test gives one by one; None ends them, an error fails them."""

    def __init__(self, *given):
        self.queue = asyncio.Queue()
        self.closed = asyncio.Event()
        for each in given:
            self.queue.put_nowait(each)

    async def events(self):
        try:
            while (each := await self.queue.get()) is not None:
                if isinstance(each, Exception):
                    raise each
                yield each
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(0)  # what cleans up may wait
            self.closed.set()


async def begun(client, source):
    response = await stream(source.events())
    return asyncio.create_task(response(SCOPE, client.receive, client.send))


async def test_each_event_is_one_write_and_the_end_is_another():
    client, source = Client(), Source(encoded("1"), encoded("2", "two") + encoded("3"), None)
    async with asyncio.timeout(10):
        await (await begun(client, source))
    assert client.bodies == [b"data: 1\n\n", b"event: two\ndata: 2\n\ndata: 3\n\n", b""]
    assert client.ended
    assert source.closed.is_set()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    headers = dict(client.start["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-store"
    assert b"content-length" not in headers


async def test_an_error_before_the_first_event_is_raised_before_anything_is_sent():
    with pytest.raises(GenerationFailed):
        await stream(Source(GenerationFailed("x")).events())


async def test_a_later_error_is_raised_as_it_is_and_the_events_are_closed():
    client, source = Client(), Source(b"1", GenerationFailed("x"))
    with pytest.raises(GenerationFailed):
        await (await begun(client, source))
    assert client.bodies == [b"1"]
    assert source.closed.is_set()


async def test_a_client_that_leaves_has_the_events_closed():
    client, source = Client(), Source(b"1")
    sending = await begun(client, source)
    await client.hears(1)
    client.left.set()
    async with asyncio.timeout(10):
        await sending
    assert source.closed.is_set()
    assert client.bodies == [b"1"]


async def test_a_client_that_leaves_without_reading_has_the_events_closed():
    client, source = Client(), Source(b"1", b"2")
    client.reads.clear()
    sending = await begun(client, source)
    client.left.set()
    async with asyncio.timeout(10):
        await sending
    assert source.closed.is_set()
    assert client.bodies == []


async def test_whoever_cancels_the_response_has_the_events_closed():
    client, source = Client(), Source(b"1")
    sending = await begun(client, source)
    await client.hears(1)
    sending.cancel()
    with suppress(asyncio.CancelledError):
        await sending
    assert sending.cancelled()
    assert source.closed.is_set()


async def test_no_comment_is_sent_before_the_head(monkeypatch):
    monkeypatch.setattr(subject, "PING_S", 0.01)
    client, source = Client(), Source(b"1")
    client.reads.clear()
    sending = await begun(client, source)
    await client.until(lambda: client.num_looks >= 5)
    client.reads.set()
    source.queue.put_nowait(None)
    async with asyncio.timeout(10):
        await sending
    assert client.bodies[0] == b"1"


async def test_a_silent_stream_has_comments_until_its_end(monkeypatch):
    monkeypatch.setattr(subject, "PING_S", 0.01)
    client, source = Client(), Source(b"1")
    sending = await begun(client, source)
    await client.hears(3)
    source.queue.put_nowait(None)
    async with asyncio.timeout(10):
        await sending
    assert client.bodies[0] == b"1"
    assert set(client.bodies[1:-1]) == {PING}
    assert client.ended


@pytest.mark.parametrize("last", [b"2", None], ids=["event", "end"])
async def test_no_comment_is_sent_to_a_client_that_has_not_read_the_latest(last, monkeypatch):
    monkeypatch.setattr(subject, "PING_S", 0.01)
    client, source = Client(), Source(b"1")
    sending = await begun(client, source)
    await client.hears(1)
    client.reads.clear()
    looks = client.num_looks + 5
    source.queue.put_nowait(last)
    await client.until(lambda: client.num_looks >= looks)
    source.queue.put_nowait(None)
    client.reads.set()
    async with asyncio.timeout(10):
        await sending
    assert client.bodies.count(PING) <= 1, "of those that were due, one may have been on its way before"
    assert b"".join(body for body in client.bodies if body != PING) == b"1" + (last or b"")
