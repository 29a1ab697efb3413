"""What OpenAI's client makes of errors, before a stream and in it; and clients that leave."""

import asyncio
import contextlib

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from mlx_mcp.api.openai import streaming
from mlx_mcp.api.openai.api import OPENAI
from mlx_mcp.api.web.failure import Failure
from mlx_mcp.errors import CapacityError, GenerationFailed
from tests.api.mcp.test_tools import freed_within_a_step, held
from tests.api.openai import house
from tests.api.openai.house import client_of, http_client, pause_after, serving, user
from tests.engine.test_client import until
from tests.service.house import make_service

MANY = {"max_tokens": 90}


def chat(client, text="hello", model="tiny", **asked):
    return client.chat.completions.create(model=model, messages=user(text), **asked)


def respond(client, text="hello", model="tiny", **asked):
    return client.responses.create(model=model, input=text, **asked)


async def read(asked, into):
    """Read a stream to its end."""
    async for each in await asked:
        into.append(each)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, respond])
async def test_an_error_before_the_answer_has_its_class_status_and_code(engine, ask, stream):
    async with client_of(engine) as client:
        for asked, kind, code in (
            ({"model": "none"}, openai.NotFoundError, "model_not_found"),
            ({"text": "x" * 101}, openai.BadRequestError, "context_length_exceeded"),
            ({"text": ""}, openai.BadRequestError, None),
            ({"temperature": 9}, openai.BadRequestError, None),
        ):
            with pytest.raises(kind) as caught:
                await ask(client, stream=stream, **asked)
            assert (caught.value.code, caught.value.type) == (code, "invalid_request_error")
        engine.close()
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(client, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")


async def test_a_body_of_another_shape_is_refused_with_the_member_at_fault(engine):
    async with client_of(engine) as client:
        for asked, param in (({"max_tokens": "many"}, "max_tokens"), ({"messages": []}, "messages"), ({"n": 65}, "n")):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**{"model": "tiny", "messages": user("hi")} | asked)
            assert caught.value.param == param


async def test_a_picture_is_refused_by_the_service(engine):
    part = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    async with client_of(engine) as client:
        with pytest.raises(openai.BadRequestError, match="The models here cannot see"):
            await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part]}])


async def test_a_session_that_is_not_there_or_busy_is_told():
    service = make_service()
    engine = service.engine
    async with client_of(engine, service) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await chat(client, extra_body={"session_id": "s_none"})
        assert caught.value.code == "session_not_found"
        session = (await chat(client, "hi", extra_body={"keep": True})).session_id
        gate = pause_after(engine, len(engine.loader.runner.steps) + 1)
        turn, busy = (asyncio.create_task(chat(client, "on", extra_body={"session_id": session})) for _ in range(2))
        await until(lambda: not gate.is_set() and engine.thread._inbox)  # one runs, the other has arrived
        gate.set()
        told = await asyncio.gather(turn, busy, return_exceptions=True)
    [refused] = [each for each in told if isinstance(each, openai.ConflictError)]
    assert refused.code == "session_busy"
    engine.close()


async def test_several_answers_cannot_all_be_a_sessions_next_turn(engine):
    async with client_of(engine) as client:
        for where in ({"keep": True}, {"parent_session_id": "s_none"}):
            with pytest.raises(openai.BadRequestError, match="A session goes on with one answer"):
                await chat(client, n=2, temperature=1.0, extra_body=where)


class Recording(AsyncOpenAI):
    """Notes how long it would wait before it tries again, and does not."""

    waits: tuple[float, ...] = ()

    def _calculate_retry_timeout(self, *args, **kwargs):
        self.waits += (super()._calculate_retry_timeout(*args, **kwargs),)
        return 0


async def test_a_client_tries_again_when_the_server_says(engine, monkeypatch):
    generate, refused = engine.generate, []

    def full(request):
        if len(refused) < 2:
            refused.append(request)
            raise CapacityError("Full.", 6.5)
        return generate(request)

    monkeypatch.setattr(engine, "generate", full)
    async with (
        serving(engine) as address,
        Recording(base_url=f"{address}/v1", api_key="none", http_client=http_client()) as client,
    ):
        made = await chat(client)
        refused.clear()
        with pytest.raises(openai.InternalServerError, match="Full"):
            await chat(client.with_options(max_retries=0))
    assert made.choices[0].message.content == "hello"
    assert client.waits == (7.0, 7.0)


async def test_an_error_within_a_stream_of_chunks_is_raised_by_the_client(engine, monkeypatch):
    monkeypatch.setattr(engine, "generate", breaking(engine))
    async with client_of(engine) as client:
        for n, texts in ((1, ["", "h"]), (2, ["", "", "h"])):
            chunks = []
            with pytest.raises(openai.APIError, match="It broke") as caught:
                await read(chat(client, "h" * 9, stream=True, n=n, temperature=1.0), chunks)
            assert [chunk.choices[0].delta.content for chunk in chunks][: len(texts)] == texts
            assert caught.value.type == "server_error"
        chunks = []
        with pytest.raises(openai.APIError, match="It broke"):
            await read(client.completions.create(model="tiny", prompt="h", stream=True), chunks)
        assert [chunk.choices[0].text for chunk in chunks] == ["h"]


async def test_an_error_within_a_response_fails_it_and_is_raised_by_the_client(engine, monkeypatch):
    monkeypatch.setattr(engine, "generate", breaking(engine))
    async with client_of(engine) as client:
        events = []
        with pytest.raises(openai.APIError, match="It broke"):
            await read(respond(client, "h", stream=True), events)
        async with client.responses.with_streaming_response.create(model="tiny", input="h", stream=True) as response:
            sent = await response.text()
    kinds = [event.type for event in events]
    assert kinds[-1] == "response.output_text.delta"
    assert [line.partition(" ")[2] for line in sent.splitlines() if line.startswith("event:")] == [
        *kinds,
        "error",
        "response.failed",
    ]
    assert not engine.thread.sessions


def breaking(engine):
    """What generates no more than the first piece of text."""
    generate = engine.generate

    async def broken(request):
        async with contextlib.aclosing(generate(request)) as updates:
            async for update in updates:
                yield update
                if hasattr(update, "kind"):
                    raise GenerationFailed("It broke. Call again.")

    return broken


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, respond])
async def test_a_client_that_leaves_while_it_waits_frees_its_row_within_a_step(engine, ask, stream):
    await held(engine)
    asked = {"max_tokens": 90} if ask is chat else {"max_output_tokens": 90}
    async with client_of(engine) as client:
        call = asyncio.create_task(ask(client, "abc", stream=stream, **asked))
        await until(lambda: engine.loader.runner.steps)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        await freed_within_a_step(engine)
    assert not engine.thread.sessions


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_a_stream_frees_its_rows_within_a_step(n):
    service = make_service()
    engine = service.engine
    engine.loader.runner.endless = True
    pause_after(engine, 6)
    async with client_of(engine, service) as client:
        stream = await chat(client, stream=True, n=n, temperature=1.0, max_tokens=1000)
        await anext(aiter(stream))
        await until(lambda: len(engine.loader.runner.steps) == 7)
        await stream.close()
        await until(lambda: len(engine.thread._inbox) >= n)
        engine.loader.runner.gate.set()
        await until(lambda: engine.stats.rows == engine.stats.running == 0)
    assert len(engine.loader.runner.steps) <= 8
    engine.close()


@pytest.mark.parametrize("asked", [{"extra_body": {"parent_session_id": "parent"}}, {"previous_response_id": "parent"}])
async def test_a_fork_whose_answer_nobody_waits_for_is_closed(engine, asked):
    async with client_of(engine) as client:
        if "extra_body" in asked:
            parent = (await chat(client, "hi", extra_body={"keep": True})).session_id
            asked = {"extra_body": {"parent_session_id": parent}, "max_tokens": 50}
        else:
            asked = {"previous_response_id": (await respond(client, "hi")).id, "max_output_tokens": 50}
        engine.loader.runner.endless = True
        gate = pause_after(engine, len(engine.loader.runner.steps) + 4)
        ask = chat if "extra_body" in asked else respond
        stream = await ask(client, "on", stream=True, **asked)
        await anext(aiter(stream))
        await until(lambda: not gate.is_set())
        assert len(engine.thread.sessions) == 2
        await stream.close()
        await until(lambda: engine.thread._inbox)
        gate.set()
        await until(lambda: len(engine.thread.sessions) == 1)


async def test_a_stream_that_must_wait_long_begins_before_there_is_anything_to_say(engine, monkeypatch):
    monkeypatch.setattr(streaming, "BEGIN_S", 0.0)
    engine.loader.hold.clear()
    async with client_of(engine) as client:
        stream = await chat(client, stream=True)  # returns with the headers
        first = await anext(aiter(stream))
        assert first.choices[0].delta.role == "assistant"
        assert not engine.loader.runner.steps
        engine.loader.hold.set()
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "hello"
        with pytest.raises(openai.APIError, match="Shorten the prompt") as caught:
            await read(chat(client, "x" * 101, stream=True), [])
    assert caught.value.code == "context_length_exceeded"


async def test_a_stop_that_gives_a_stream_no_more_time_is_its_last_event(engine, monkeypatch):
    engine.loader.runner.endless = True
    made = []
    monkeypatch.setattr(house, "Activity", lambda make=house.Activity: made.append(make()) or made[-1])
    gate = pause_after(engine, 4)
    async with client_of(engine) as client:
        reading = asyncio.create_task(read(chat(client, stream=True, **MANY), []))
        await until(lambda: not gate.is_set())
        made[0].cut_off()
        with pytest.raises(openai.APIError, match="gives calls no more time"):
            await reading
        gate.set()
        made[0].closed = True
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            await chat(client)


async def test_there_are_no_embeddings(engine):
    async with client_of(engine) as client:
        with pytest.raises(openai.BadRequestError, match="No model here makes embeddings"):
            await client.embeddings.create(model="tiny", input="hi")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (429, openai.RateLimitError),
        (503, openai.InternalServerError),
    ],
)
async def test_a_refusal_by_status_is_the_clients_error_of_that_status(status, kind):
    refusal = OPENAI.refuse(Failure(status, "Not now. Call later.", 2.0))
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=refusal), verify=False)
    async with AsyncOpenAI(base_url="http://x/v1", api_key="none", max_retries=0, http_client=http) as client:
        with pytest.raises(kind, match="Not now") as caught:
            await chat(client)
    assert caught.value.response.headers["retry-after"] == "2"
