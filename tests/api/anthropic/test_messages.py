"""Anthropic's own SDK on the Messages API, over sockets: on fakes, which echo the prompt, and on the embedded model."""

import asyncio
import json
import threading
import warnings
from types import SimpleNamespace

import anthropic
import httpx2
import pytest
from pydantic import BaseModel

from mlx_mcp.api.anthropic.answer_shapes import Answer, ErrorBody, Event
from mlx_mcp.config import Config
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.wiring import wire
from tests.api.anthropic.serving import asking, serving
from tests.engine.test_client import until
from tests.fakes import FakeLoader, fake_client

LOOK = {"name": "look", "description": "looks", "input_schema": {"type": "object", "properties": {}}}
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
THINKING = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture
def loader():
    return FakeLoader()


@pytest.fixture
def engine(loader):
    engine = fake_client(loader)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def embedded():
    """The embedded model, on an engine that all tests share; and what can be asked for there."""
    client, registry = wire(Config.load())
    yield client, registry
    client.close()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="anthropic|pydantic")
        yield


def asked(prompt, **fields):
    return {"model": "tiny", "max_tokens": 90, "messages": [{"role": "user", "content": prompt}]} | fields


async def raw(address, body, **headers):
    """A response as it comes, and its events if it is a stream."""
    async with httpx2.AsyncClient(base_url=address) as client:
        response = await client.post("/v1/messages?beta=true", json=body, headers=headers)
    pairs = [chunk.split("\n", 1) for chunk in response.text.split("\n\n") if chunk.startswith("event: ")]
    return response, [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


# Answers


async def test_an_answer_has_text_usage_and_the_reason_of_its_end(engine):
    async with asking(engine) as client:
        answer = await client.messages.create(**asked("hello"))
    assert [(block.type, block.text) for block in answer.content] == [("text", "hello")]
    assert (answer.role, answer.type, answer.model, answer.stop_reason) == ("assistant", "message", "tiny", "end_turn")
    assert (answer.stop_sequence, answer.usage.input_tokens, answer.usage.output_tokens) == (None, 5, 5)
    assert answer.id.startswith("msg_")
    assert answer._request_id.startswith("req_")


async def test_thoughts_text_and_calls_are_blocks_of_their_own(engine):
    async with asking(engine) as client:
        answer = await client.messages.create(**asked("[hm]I look{look}", tools=[LOOK], thinking=THINKING))
    thinking, text, call = answer.content
    assert (thinking.type, thinking.thinking, text.text) == ("thinking", "hm", "I look")
    assert thinking.signature
    assert (call.type, call.name, call.input, answer.stop_reason) == ("tool_use", "look", {}, "tool_use")
    assert call.id.startswith("toolu_")


async def test_thoughts_come_only_if_they_are_asked_for(engine):
    async with asking(engine) as client:
        answer = await client.messages.create(**asked("[hm]yes"))
    assert [block.type for block in answer.content] == ["text"]


async def test_of_several_calls_one_is_returned_if_one_is_wanted(engine):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    async with asking(engine) as client:
        both = await client.messages.create(**asked("{look}{look}", tools=[LOOK]))
        one = await client.messages.create(**asked("{look}{look}", tools=[LOOK], tool_choice=choice))
    assert len({block.id for block in both.content}) == 2
    assert [block.type for block in one.content] == ["tool_use"]


async def test_a_result_of_a_tool_goes_back_under_its_calls_id(engine):
    async with asking(engine) as client:
        first = await client.messages.create(**asked("{look}", tools=[LOOK]))
        (call,) = first.content
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "open"}
        said = [{"role": "user", "content": "{look}"}, {"role": "assistant", "content": first.content}]
        answer = await client.messages.create(
            **asked("", messages=[*said, {"role": "user", "content": [result]}], tools=[LOOK])
        )
    assert answer.content[0].text == "open"


async def test_an_answer_ends_at_a_stop_sequence_or_at_its_most_tokens(engine):
    async with asking(engine) as client:
        stopped = await client.messages.create(**asked("one two", stop_sequences=["x", " t"]))
        cut = await client.messages.create(**asked("one two", max_tokens=3))
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("one", "stop_sequence", " t")
    assert (cut.content[0].text, cut.stop_reason, cut.usage.output_tokens) == ("one", "max_tokens", 3)


async def test_more_tokens_than_fit_the_context_or_the_memory_are_lowered(loader):
    loader.runner.endless = True
    for limits in ({}, {"max_kv_bytes": 128}):
        loader.context_tokens = 100 if not limits else 100_000
        engine = fake_client(loader, **limits)
        async with asking(engine) as client:
            answer = await client.messages.create(**asked("x" * 20, max_tokens=20_000))
        engine.close()
        assert answer.stop_reason == "max_tokens"
        assert 20 < answer.usage.output_tokens <= 128


async def test_no_tokens_at_all_compute_the_prompt_for_a_later_call(engine):
    async with asking(engine) as client:
        warm = await client.messages.create(**asked("x" * 80, max_tokens=0))
        again = await client.messages.create(**asked("x" * 80, max_tokens=10))
    assert (warm.content, warm.stop_reason, warm.usage.output_tokens) == ([], "max_tokens", 0)
    assert again.usage.cache_read_input_tokens >= 64
    assert again.usage.cache_read_input_tokens + again.usage.input_tokens == 80


async def test_blank_text_makes_no_block(engine):
    async with asking(engine) as client:
        answer = await client.messages.create(**asked("[ \n] \n{look}", tools=[LOOK], thinking=THINKING))
        led = await client.messages.create(**asked("[hm]\n\nyes", thinking=THINKING))
    assert [block.type for block in answer.content] == ["tool_use"]
    assert [block.type for block in led.content] == ["thinking", "text"]
    assert led.content[1].text == "\n\nyes"


async def test_what_was_ignored_is_told_and_counted_and_refuses_nothing(engine):
    async with serving(engine) as address, anthropic.AsyncAnthropic(base_url=address, api_key="none") as client:
        answer = await client.beta.messages.create(
            **asked("hi", metadata={"user_id": "x"}, context_management={"edits": []}, tools=[LOOK]),
            betas=["context-management-2025-06-27", "unheard-of-2030-01-01"],
            extra_body={"canary": "canary"},
        )
        async with httpx2.AsyncClient() as other:
            metrics = (await other.get(f"{address}/metrics")).text
    assert 'mlx_mcp_ignored_total{part="context_management"} 1.0' in metrics
    assert "canary" not in metrics
    assert answer.notes == ["Ignored: context_management, metadata, unknown fields."]


# Streams


async def test_a_stream_has_its_events_in_anthropics_order(engine):
    body = asked("[hm]I look{look}", tools=[LOOK], thinking=THINKING, stream=True)
    async with serving(engine) as address:
        response, events = await raw(address, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"].startswith("req_")
    assert all(name == data["type"] for name, data in events)
    kinds = [(data["type"], data.get("index"), data.get("delta", {}).get("type")) for _, data in events]
    assert kinds == [
        ("message_start", None, None),
        ("content_block_start", 0, None),
        ("ping", None, None),
        *[("content_block_delta", 0, "thinking_delta")] * 2,
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        *[("content_block_delta", 1, "text_delta")] * 6,
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    for _, data in events:
        Event.model_validate(data, strict=True)
    start, end = events[0][1]["message"], events[-2][1]
    assert (start["content"], start["stop_reason"], start["usage"]["input_tokens"]) == ([], None, 16)
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"] | {"output_tokens": 0} == start["usage"]


async def test_a_streams_first_event_tells_what_was_there_already(engine):
    async with serving(engine) as address:
        for _ in range(2):
            _, events = await raw(address, asked("x" * 80, stream=True))
    start, end = events[0][1]["message"]["usage"], events[-2][1]["usage"]
    assert start == end | {"output_tokens": 0}
    assert start["cache_read_input_tokens"] >= 64


async def test_the_sdks_own_helper_puts_a_stream_together_to_the_same_answer(engine):
    body = asked("[hm]I look{look}", tools=[LOOK], thinking=THINKING)
    async with asking(engine) as client:
        whole = await client.messages.create(**body)
        async with client.messages.stream(**body) as stream:
            texts = [text async for text in stream.text_stream]
            streamed = await stream.get_final_message()
    assert "".join(texts) == "I look"
    shown = [{**block.to_dict(), "id": ""} for block in streamed.content]
    assert shown == [{**block.to_dict(), "id": ""} for block in whole.content]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


async def test_an_empty_answer_is_a_message_without_blocks(engine):
    async with serving(engine) as address:
        _, events = await raw(address, asked("{look", max_tokens=0, stream=True))
        _, cut = await raw(address, asked("{look", max_tokens=2, stream=True))
    assert [name for name, _ in events] == ["message_start", "message_delta", "message_stop"]
    assert cut[1][1]["content_block"] == {"type": "text", "text": ""}, "what was cut off is text"


async def test_a_client_that_leaves_frees_its_row(engine, loader):
    loader.runner.endless = True
    loader.context_tokens = 1_000_000
    async with asking(engine) as client:
        stream = await client.messages.create(**asked("x", max_tokens=900_000), stream=True)
        async for event in stream:
            if event.type == "content_block_delta":
                break
        assert loader.runner.num_rows == 1
        await stream.close()
        await until(lambda: loader.runner.num_rows == 0)


async def test_pings_come_while_a_prompt_is_read_or_waits(engine, loader, monkeypatch):
    monkeypatch.setattr("mlx_mcp.api.anthropic.api.PING_S", 0.0)
    loader.context_tokens = 3000
    async with serving(engine) as address:
        _, events = await raw(address, asked("x" * 2000, max_tokens=1, stream=True))
    names = [name for name, _ in events]
    assert events[0][1]["message"]["usage"]["input_tokens"] == 0, "what is computed of it is not known yet"
    assert events[-2][1]["usage"]["input_tokens"] == 2000
    assert names[:2] == ["message_start", "ping"]
    assert names.index("content_block_start") > 2


# Errors


async def test_each_error_is_the_sdks_own(engine, loader):
    async with asking(engine) as client:
        with pytest.raises(anthropic.NotFoundError, match="Model not found") as missing:
            await client.messages.create(**asked("hi", model="none"))
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 101 tokens > 100 maximum"):
            await client.messages.create(**asked("x" * 101))
        with pytest.raises(anthropic.BadRequestError, match="cannot see"):
            await client.messages.create(**asked([PICTURE]))
        with pytest.raises(anthropic.BadRequestError, match=r"messages.0.role"):
            await client.messages.create(**asked("", messages=[{"role": "owl", "content": "hi"}]))
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long") as streamed:
            await client.messages.create(**asked("x" * 101), stream=True)
    assert missing.value.body["error"]["type"] == "not_found_error"
    assert missing.value.request_id == missing.value.body["request_id"]
    assert streamed.value.body["error"]["type"] == "invalid_request_error"
    ErrorBody.model_validate(streamed.value.body, strict=True)


async def test_an_engine_that_is_gone_is_an_error_of_the_server(engine):
    async with asking(engine) as client:
        await client.messages.create(**asked("hi"))
        engine.close()
        with pytest.raises(anthropic.InternalServerError, match="restart the server") as error:
            await client.messages.create(**asked("hi"))
    assert (error.value.status_code, error.value.body["error"]["type"]) == (503, "api_error")


async def test_a_body_that_is_no_json_is_refused_in_the_same_form(engine):
    async with serving(engine) as address, httpx2.AsyncClient(base_url=address) as client:
        response = await client.post("/v1/messages", content="{")
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_full_server_is_overloaded_and_asked_again_when_it_said(loader, monkeypatch):
    engine, waits = fake_client(loader, Limits(max_running=1, max_waiting=0)), []
    loader.runner.endless, loader.context_tokens = True, 1_000_000

    async def sleep(seconds):
        waits.append(seconds)
        await first.close()
        await until(lambda: loader.runner.num_rows == 0)

    async with asking(engine) as client, asking(engine, max_retries=1) as patient:
        first = await client.messages.create(**asked("first", max_tokens=900_000), stream=True)
        with pytest.raises(anthropic._exceptions.OverloadedError) as error:
            await client.messages.create(**asked("second"))
        monkeypatch.setattr("anthropic._base_client.anyio", SimpleNamespace(sleep=sleep))
        answer = await patient.messages.create(**asked("third", max_tokens=5))
    engine.close()
    assert (error.value.status_code, error.value.body["error"]["type"]) == (529, "overloaded_error")
    assert answer.content[0].text == "third"
    assert waits == [int(error.value.response.headers["retry-after"])]


async def test_an_error_amid_a_stream_is_its_last_event(engine, loader):
    loader.runner.endless = True
    loader.context_tokens = 1_000_000
    async with asking(engine) as client:
        stream = await client.messages.create(**asked("x", max_tokens=900_000), stream=True)
        with pytest.raises(anthropic.APIStatusError, match="engine is not running") as error:
            await end_amid(stream, engine)
    assert error.value.body["error"]["type"] == "api_error"


async def end_amid(stream, engine):
    """Read a stream whose engine ends at the first text."""
    async for event in stream:
        if event.type == "content_block_delta":
            await asyncio.to_thread(engine.close)


# Counts and models


async def test_tokens_are_counted_as_they_are_given_to_the_model(engine):
    async with asking(engine) as client:
        counted = await client.messages.count_tokens(model="tiny", messages=asked("hello")["messages"], system="hi ")
        beta = await client.beta.messages.count_tokens(model="tiny", messages=asked("hello")["messages"])
    assert (counted.input_tokens, beta.input_tokens) == (8, 5)


async def test_models_are_listed_by_pages(embedded):
    engine, registry = embedded
    async with asking(engine, registry) as client:
        listed = [model async for model in client.models.list(limit=1)]
        one = await client.models.retrieve(listed[0].id)
        with pytest.raises(anthropic.NotFoundError, match="Model not found: 'a/b'"):
            await client.models.retrieve("a/b")
        with pytest.raises(anthropic.BadRequestError, match="limit is '0'; it must be from 1 to 1000"):
            await client.models.list(limit=0)
        first = await client.models.list()
        assert (await client.models.list(before_id=first.data[0].id)).data == []
        assert (await client.models.list(after_id="none")).data == []
    assert [model.id for model in listed] == [model.id for model in first.data]
    assert (one.id, one.type, one.max_input_tokens) == ("embedded", "model", 2048)


# The embedded model


def test_the_synchronous_client_holds_a_conversation_that_computes_only_what_is_new(embedded):
    asyncio.run(in_a_thread(embedded, converse))


async def in_a_thread(embedded, function):
    async with serving(*embedded) as address:
        await asyncio.to_thread(function, address)


def converse(address):
    client = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)
    said, known = [], 0
    system = [{"type": "text", "text": f"x-anthropic-billing-header: cc_version={id(said)};"}]
    facts = {
        "type": "text",
        "text": "Alice's badge is 771. Bob's badge is 342.",
        "cache_control": {"type": "ephemeral"},
    }
    for name, badge in (("Alice", "771"), ("Bob", "342"), ("Alice", "771"), ("Bob", "342")):
        said.append({"role": "user", "content": [{"type": "text", "text": f"What is {name}'s badge?"}]})
        answer = client.messages.create(model="embedded", max_tokens=10_000, system=[*system, facts], messages=said)
        assert answer.content[0].text == badge
        assert answer.usage.cache_read_input_tokens >= known
        known = answer.usage.cache_read_input_tokens + answer.usage.input_tokens + answer.usage.output_tokens
        said.append({"role": "assistant", "content": answer.content})
    client.close()


async def test_two_conversations_share_what_claude_codes_billing_line_would_part(embedded):
    rules = "The deploy code is 4096. Always answer with the code. " * 8
    async with asking(*embedded) as client:
        used = []
        for version in ("2.1.332.a1b", "2.1.332.f00"):
            line = f"x-anthropic-billing-header: cc_version={version}; cc_entrypoint=cli;"
            system = [{"type": "text", "text": text} for text in (line, rules)]
            body = asked(f"What is the deploy code? {version}", model="embedded", system=system)
            used.append((await client.messages.create(**body)).usage)
    assert used[1].cache_read_input_tokens > 0.8 * (used[1].input_tokens + used[1].cache_read_input_tokens)


class Badge(BaseModel):
    badge: int


async def test_a_schema_is_obeyed_and_parsed_by_the_sdk(embedded):
    async with asking(*embedded) as client:
        said = asked("Alice's badge is 771. What is Alice's badge?", model="embedded")
        answer = await client.messages.parse(**said, output_format=Badge)
    assert isinstance(answer.parsed_output, Badge)


async def test_a_tool_is_called_and_its_result_answered(embedded):
    tool = {"name": "lookup", "input_schema": {"type": "object", "properties": {"key": {"type": "string"}}}}
    said = asked("Look up Alice's badge.", model="embedded", tools=[tool], tool_choice={"type": "any"})
    async with asking(*embedded) as client:
        answer = await client.messages.create(**said)
    assert (answer.stop_reason, answer.content[-1].name) == ("tool_use", "lookup")
    assert isinstance(answer.content[-1].input, dict)


async def test_the_shapes_are_those_of_the_answers(engine):
    async with serving(engine) as address:
        response, _ = await raw(address, asked("[hm]I look{look}", tools=[LOOK], thinking=THINKING))
    assert Answer.model_validate(response.json(), strict=True).model_dump(exclude_none=True)
    assert threading.active_count() < 100
