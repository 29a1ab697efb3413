"""Responses by OpenAI's own client."""

import asyncio
import dataclasses
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from mlx_mcp.service.limits import Limiter, Limits
from mlx_mcp.service.replies import Replies
from tests.api.openai.house import client_of, pause_after
from tests.engine.test_client import until
from tests.service.house import make_service, requests_of

CODE = "The code is 4096. What is the code?"
KEYS = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"], "additionalProperties": False}
LOOKUP = {"type": "function", "name": "lookup", "parameters": KEYS, "strict": True}
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def service():
    """Fakes with a context of 2,000 letters."""
    service = make_service()
    yield service
    service.engine.close()


async def ask(client, text, **asked):
    return await client.responses.create(**{"model": "tiny", "input": text} | asked)


async def sent(client, text, **asked):
    """The events of a stream, as they were sent."""
    stream = await ask(client, text, stream=True, **asked)
    return [event.model_dump(exclude_unset=True) async for event in stream]


async def test_a_response_has_all_that_openais_has(service):
    async with client_of(service.engine, service) as client:
        made = await ask(client, "hello", metadata={"a": "b"}, temperature=0.0)
    told = made.model_dump(exclude_unset=True)
    [message] = told.pop("output")
    assert made.id.startswith("resp_")
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}],
    }
    assert told["completed_at"] >= told["created_at"] > 1_700_000_000
    assert {key: value for key, value in told.items() if key not in ("id", "created_at", "completed_at")} == {
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {"a": "b"},
        "model": "tiny",
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "session_id": made.session_id,
        "store": True,
        "temperature": 0.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 10,
        },
    }


async def test_the_events_come_in_openais_order(service):
    async with client_of(service.engine, service) as client:
        events = await sent(client, "[h]y{look}", tools=[LOOK])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    shown = [(event["type"], event.get("output_index")) for event in events]
    assert shown == [
        ("response.created", None),
        ("response.in_progress", None),
        ("response.output_item.added", 0),
        ("response.content_part.added", 0),
        ("response.reasoning_text.delta", 0),
        ("response.reasoning_text.done", 0),
        ("response.content_part.done", 0),
        ("response.output_item.done", 0),
        ("response.output_item.added", 1),
        ("response.content_part.added", 1),
        ("response.output_text.delta", 1),
        ("response.output_text.done", 1),
        ("response.content_part.done", 1),
        ("response.output_item.done", 1),
        ("response.output_item.added", 2),
        ("response.function_call_arguments.delta", 2),
        ("response.function_call_arguments.done", 2),
        ("response.output_item.done", 2),
        ("response.completed", None),
    ]
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["status"] for item in added] == ["in_progress"] * 3
    assert [item["id"] for item in added] == [item["id"] for item in done]
    assert events[-1]["response"]["output"] == done
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call"]
    assert (done[2]["name"], done[2]["arguments"], done[2]["call_id"][:5]) == ("look", "{}", "call_")
    assert done[0]["content"] == [{"type": "reasoning_text", "text": "h"}]
    assert {event["response"]["status"] for event in events[:2]} == {"in_progress"}
    assert events[-1]["response"]["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}


async def test_an_answer_that_is_cut_off_is_incomplete(service):
    async with client_of(service.engine, service) as client:
        made = await ask(client, "hello", max_output_tokens=2)
        events = await sent(client, "hello", max_output_tokens=2)
    assert (made.status, made.incomplete_details.reason, made.output_text) == ("incomplete", "max_output_tokens", "he")
    assert made.output[0].status == "incomplete"
    assert events[-1]["type"] == "response.incomplete"


async def test_two_continuations_of_one_response_are_both_right(service):
    async with client_of(service.engine, service) as client:
        first = await ask(client, "one", instructions="Be brief. ")
        both = await asyncio.gather(*(ask(client, text, previous_response_id=first.id) for text in ("two", "six")))
        third = await ask(client, "ten", previous_response_id=both[1].id)
    assert [made.output_text for made in both] == ["two", "six"]
    # The instructions, each turn and its echo, and a bar between turns.
    before = 2 * len("Be brief. one")
    assert [made.usage.input_tokens for made in (first, *both, third)] == [13, before + 4, before + 4, before + 11]
    assert third.usage.input_tokens_details.cached_tokens > 0
    assert both[0].instructions == "Be brief. "
    assert len(service.engine.thread.sessions) == 4
    assert {info.name for info in service.engine.thread.sessions.values()} == {
        made.id for made in (first, *both, third)
    }


async def test_what_an_agent_repeats_with_each_request_is_told_once(service, monkeypatch):
    asked = requests_of(service, monkeypatch)
    async with client_of(service.engine, service) as client:
        always = {"instructions": "Look. ", "tools": [LOOK], "model": "tiny"}
        first = await ask(client, "{look}", **always)
        result = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "red"}
        await ask(client, [result], previous_response_id=first.id, **always)
    assert [(m.role, m.text) for m in asked[0].messages] == [("system", "Look. "), ("user", "{look}")]
    assert asked[0].tools[0]["function"]["name"] == "look"
    assert [(m.role, m.text, m.name) for m in asked[1].messages] == [("tool", "red", "look")]
    assert (asked[1].tools, asked[1].session[:2]) == ((), "s_")


async def test_other_instructions_tools_or_models_have_the_conversation_told_anew(service, monkeypatch):
    asked = requests_of(service, monkeypatch)
    async with client_of(service.engine, service) as client:
        first = await ask(client, "one", instructions="Be brief. ")
        changes = ({"instructions": "Be long. "}, {"tools": [LOOK]}, {"model": "other"})
        for change in changes:
            await ask(client, "two", previous_response_id=first.id, **change)
        nudged = [{"role": "developer", "content": "Hm. "}, {"role": "user", "content": "two"}]
        await ask(client, nudged, previous_response_id=first.id)
    said = [[message.text for message in request.messages] for request in asked[1:]]
    echo = "Be brief. one"
    assert said == [
        ["Be long. ", "one", echo, "two"],
        ["Be brief. ", "one", echo, "two"],
        ["Be brief. ", "one", echo, "two"],
        ["Be brief. ", "one", echo, "Hm. ", "two"],
    ]
    assert not any(request.session for request in asked)
    assert asked[3].model == "other"


async def test_a_request_without_the_sessions_tools_gets_no_calls(service, monkeypatch):
    asked = requests_of(service, monkeypatch)
    async with client_of(service.engine, service) as client:
        first = await ask(client, "one", tools=[LOOK])
        await ask(client, "two", previous_response_id=first.id)
        await ask(client, "two", previous_response_id=first.id, tools=[LOOK], tool_choice="required")
    assert [request.tool_choice for request in asked] == ["auto", "none", "required"]


async def test_what_is_not_stored_leaves_no_session(service):
    async with client_of(service.engine, service) as client:
        alone = await ask(client, "one", store=False)
        first = await ask(client, "one")
        after = await ask(client, "two", store=False, previous_response_id=first.id)
        for made in (alone, after):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.responses.retrieve(made.id)
            assert caught.value.code == "response_not_found"
    assert (after.output_text, after.usage.input_tokens) == ("two", 10)
    assert set(service.engine.thread.sessions) == {first.session_id}
    assert not hasattr(after, "session_id")


async def test_a_stored_response_is_shown_and_deleted(service):
    async with client_of(service.engine, service) as client:
        first = await ask(client, [{"role": "user", "content": "one"}, {"role": "user", "content": " two"}])
        after = await ask(client, "three", previous_response_id=first.id)
        assert (await client.responses.retrieve(first.id)).model_dump() == first.model_dump()
        items = await client.responses.input_items.list(first.id)
        texts = [item.content[0].text async for item in client.responses.input_items.list(first.id, limit=1)]
        forward = await client.responses.input_items.list(first.id, order="asc")
        await client.responses.delete(first.id)
        for lost in (
            client.responses.retrieve(first.id),
            client.responses.delete(first.id),
            client.responses.input_items.list(first.id),
            client.responses.cancel(first.id),
            ask(client, "x", previous_response_id=first.id),
        ):
            with pytest.raises(openai.NotFoundError, match="It was deleted, was made"):
                await lost
        assert (await client.responses.retrieve(after.id)).output_text == "three"
        with pytest.raises(openai.BadRequestError, match="limit: Input should be greater"):
            await client.responses.input_items.list(after.id, limit=0)
    assert [item.content[0].text for item in items.data] == [" two", "one"] == texts
    assert [item.content[0].text for item in forward.data] == ["one", " two"]
    assert set(service.engine.thread.sessions) == {after.session_id}


async def test_a_response_ends_with_its_session(service):
    async with client_of(service.engine, service) as client:
        made = await ask(client, "one")
        await service.engine.close_sessions("", (made.id,))
        with pytest.raises(openai.NotFoundError, match="Send the whole conversation again"):
            await client.responses.retrieve(made.id)


async def test_too_many_responses_make_the_oldest_go_with_its_session(service):
    service = dataclasses.replace(service, replies=Replies(max_replies=2))
    async with client_of(service.engine, service) as client:
        made = [await ask(client, text) for text in ("one", "two", "six")]
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made[0].id)
        assert (await client.responses.retrieve(made[1].id)).output_text == "two"
    assert set(service.engine.thread.sessions) == {response.session_id for response in made[1:]}


@pytest.mark.parametrize("limits", [Limits(sessions=4), Limits(session_bytes=60)])
async def test_responses_that_nobody_asked_to_store_are_in_nobodys_way(service, limits):
    service = dataclasses.replace(service, limits=Limiter(lambda tenant: limits))
    async with client_of(service.engine, service) as client:
        first = await ask(client, "one" * 5)
        for _ in range(3):
            last = await ask(client, "two" * 5)
            after = await ask(client, "six", previous_response_id=last.id)
        assert after.output_text == "six"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
    assert after.session_id in service.engine.thread.sessions


async def test_limits_are_told_with_when_to_try_again(service):
    service = dataclasses.replace(service, limits=Limiter(lambda tenant: Limits(requests_per_minute=2)))
    async with client_of(service.engine, service) as client:
        await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], n=2, temperature=1
        )
        with pytest.raises(openai.RateLimitError, match="You may make 2 requests a minute") as caught:
            await ask(client, "hi")
        with pytest.raises(openai.BadRequestError, match="These are 3 requests"):
            await client.completions.create(model="tiny", prompt=["hi"] * 3)
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("rate_limit_exceeded", "30")


async def test_another_tenants_response_is_as_if_it_were_not_there(service):
    async with client_of(service.engine, service) as client:
        made = await ask(client, "one")
        reply = service.replies.get("", made.id, service.engine.thread.sessions)
        service.replies.forget(reply)
        service.replies.keep(dataclasses.replace(reply, tenant="them"), service.engine.thread.sessions)
        for lost in (client.responses.retrieve(made.id), ask(client, "x", previous_response_id=made.id)):
            with pytest.raises(openai.NotFoundError, match="Response not found"):
                await lost


async def test_a_response_in_the_background_is_fetched_when_it_is_done(service):
    async with client_of(service.engine, service) as client:
        made = await ask(client, "hello", background=True)
        assert (made.status, made.background, made.output) == ("queued", True, [])
        [reply] = service.replies._of[""].values()
        await asyncio.wait_for(reply.job.ended.wait(), 10)
        done = await client.responses.retrieve(made.id)
        assert (done.status, done.output_text) == ("completed", "hello")
        assert (await client.responses.cancel(made.id)).status == "completed"
        assert (await ask(client, "on", previous_response_id=made.id)).output_text == "on"
        failed = await ask(client, "x" * 2001, background=True)
        await until(lambda: not service.jobs.busy)
        told = await client.responses.retrieve(failed.id)
        assert (told.status, told.error.code) == ("failed", "context_length_exceeded")
        with pytest.raises(openai.BadRequestError, match="is no answer to go on from"):
            await ask(client, "on", previous_response_id=failed.id)
        with pytest.raises(openai.BadRequestError, match="What runs in the background is fetched later"):
            await ask(client, "hello", background=True, store=False)


async def test_a_response_in_the_background_can_be_cancelled_and_others_cannot(service):
    service.engine.loader.runner.endless = True
    gate = pause_after(service.engine, 3)
    async with client_of(service.engine, service) as client:
        made = [await ask(client, "hello", background=True, max_output_tokens=1000) for _ in range(2)]
        await until(lambda: not gate.is_set())
        assert (await client.responses.retrieve(made[0].id)).status == "in_progress"
        ending = [client.responses.cancel(made[0].id), client.responses.delete(made[1].id)]
        tasks = [asyncio.create_task(each) for each in ending]
        await until(lambda: service.engine.thread._inbox)
        gate.set()
        cancelled, _ = await asyncio.gather(*tasks)
        assert cancelled.status == (await client.responses.retrieve(made[0].id)).status == "cancelled"
        await until(lambda: service.engine.stats.rows == 0)
        whole = await ask(client, "hi", max_output_tokens=1)
        with pytest.raises(openai.BadRequestError, match="Only a response with background=true"):
            await client.responses.cancel(whole.id)
    assert set(service.engine.thread.sessions) == {whole.session_id}


async def test_a_long_name_of_a_tool_comes_back_with_its_result(service, monkeypatch):
    asked = requests_of(service, monkeypatch)
    name = "look_" * 12
    async with client_of(service.engine, service) as client:
        first = await ask(client, f"{{{name}}}", tools=[LOOK | {"name": name}])
        result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "red"}
        await ask(client, [result], previous_response_id=first.id)
    assert asked[-1].messages[0].name == name


@pytest.mark.parametrize("members", [{"conversation": "conv_1"}, {"prompt": {"id": "p"}}])
async def test_what_openai_stores_and_we_do_not_is_refused(service, members):
    async with client_of(service.engine, service) as client:
        with pytest.raises(openai.BadRequestError, match="Conversations and prompts are not stored here"):
            await ask(client, "hi", **members)


class Verdict(BaseModel):
    verdict: Literal["yes", "no"]


async def test_the_built_in_model_goes_on_from_a_response_and_calls_tools(embedded):
    async with client_of(embedded.engine, embedded) as client:
        told = await ask(client, "The code is 4096.", model="embedded")
        asked = [
            await ask(client, "What is the code?", model="embedded", previous_response_id=told.id) for _ in range(2)
        ]
        called = await ask(client, "Look up Bob's badge.", model="embedded", tools=[LOOKUP])
        [call] = [item for item in called.output if item.type == "function_call"]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "342"}
        answered = await ask(client, [result], model="embedded", previous_response_id=called.id, tools=[LOOKUP])
        parsed = await client.responses.parse(model="embedded", input=CODE, text_format=Verdict, max_output_tokens=60)
    assert [made.output_text for made in asked] == ["4096", "4096"]
    assert (call.name, call.arguments) == ("lookup", '{"key": "Bob\'s badge"}')
    assert answered.output_text == "342"
    assert isinstance(parsed.output_parsed, Verdict)


async def test_the_streaming_helper_takes_every_event(embedded):
    async with client_of(embedded.engine, embedded) as client:
        async with client.responses.stream(model="embedded", input="Look up Bob's badge.", tools=[LOOKUP]) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        call = final.output[-1]
        assert call.parsed_arguments == {"key": "Bob's badge"}
        conversation = [
            {"role": "user", "content": "Look up Bob's badge."},
            *(item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in final.output),
            {"type": "function_call_output", "call_id": call.call_id, "output": "342"},
        ]
        whole = {"model": "embedded", "input": conversation, "tools": [LOOKUP], "store": False}
        async with client.responses.stream(**whole) as stream:
            answered = await stream.get_final_response()
        held = {"model": "embedded", "input": CODE, "text_format": Verdict, "max_output_tokens": 60}
        async with client.responses.stream(**held) as stream:
            parsed = await stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert answered.output_text == "342"
    assert isinstance(parsed.output_parsed, Verdict)
