"""Chat completions by OpenAI's own client."""

import asyncio
import json
from typing import Literal

import httpx2
from openai import OpenAI
from pydantic import BaseModel

from mlx_mcp.chat.message import Message, ToolCall
from tests.api.http.routes import serving_all
from tests.api.openai.house import client_of, http_client, serving, user
from tests.fakes import NO_EFFORTS
from tests.service.house import make_service, requests_of

CODE = "The code is 4096. What is the code?"
KEYS = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"], "additionalProperties": False}
LOOKUP = {"type": "function", "function": {"name": "lookup", "parameters": KEYS, "strict": True}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


async def chunks(client, text, **asked):
    """The chunks of a stream, as they were sent."""
    stream = await client.chat.completions.create(**{"model": "tiny", "messages": user(text), "stream": True} | asked)
    return [chunk.model_dump(exclude_unset=True) async for chunk in stream]


def deltas(told, index=0):
    return [c["delta"] for chunk in told for c in chunk["choices"] if c["index"] == index]


async def test_an_answer_has_all_that_openais_has(engine):
    async with client_of(engine) as client:
        made = await client.chat.completions.create(model="tiny", messages=user("hello"))
    assert made.id.startswith("chatcmpl-")
    assert made.created > 1_700_000_000
    assert made.model_dump(exclude_unset=True, exclude={"id", "created"}) == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 5,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


async def test_the_client_that_blocks_is_answered_by_the_whole_server_too(engine):
    def ask(address):
        http = httpx2.Client(verify=False)
        with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, http_client=http) as client:
            whole = client.chat.completions.create(model="tiny", messages=user("hello"))
            parts = client.chat.completions.create(model="tiny", messages=user("hello"), stream=True)
            return whole.choices[0].message.content, "".join(part.choices[0].delta.content or "" for part in parts)

    async with serving_all(engine) as address:
        assert await asyncio.to_thread(ask, address) == ("hello", "hello")


async def test_a_stream_begins_with_the_role_and_ends_with_the_reason_then_the_usage(engine):
    async with client_of(engine) as client:
        told = await chunks(client, "hi", stream_options={"include_usage": True})
    assert [chunk["choices"] for chunk in told] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "h"}, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "i"}, "finish_reason": None}],
        [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        [],
    ]
    assert [chunk["usage"] is None for chunk in told] == [True] * 4 + [False]
    assert told[-1]["usage"]["total_tokens"] == 4
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in told}) == 1


async def test_the_bytes_of_a_stream_are_events_that_end_with_done(engine):
    async with serving(engine) as address, http_client() as http:
        body = {"model": "tiny", "messages": user("hi"), "stream": True}
        response = await http.post(f"{address}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)
    assert "usage" not in response.text


async def test_a_call_comes_in_two_parts_and_thoughts_under_both_names(engine):
    async with client_of(engine) as client:
        told = await chunks(client, "[h]y{look}", tools=[LOOK])
        whole = (await client.chat.completions.create(model="tiny", messages=user("[h]y{look}"), tools=[LOOK])).choices
    first = deltas(told)[3].pop("tool_calls")
    assert first[0].pop("id").startswith("call_")
    assert first == [{"index": 0, "type": "function", "function": {"name": "look", "arguments": ""}}]
    assert deltas(told) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "h", "reasoning": "h"},
        {"content": "y"},
        {},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert told[-1]["choices"][0]["finish_reason"] == whole[0].finish_reason == "tool_calls"
    said = whole[0].message.model_dump(exclude_unset=True)
    assert (said["content"], said["reasoning"], said["reasoning_content"]) == ("y", "h", "h")
    assert said["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


async def test_an_answer_that_is_a_call_alone_has_no_content(engine):
    async with client_of(engine) as client:
        made = await client.chat.completions.create(model="tiny", messages=user("{look}"), tools=[LOOK])
    assert made.choices[0].message.content is None


async def test_a_client_that_takes_one_call_gets_the_first(engine):
    asked = {"model": "tiny", "messages": user("{look}{see}"), "tools": [LOOK]}
    async with client_of(engine) as client:
        many = await client.chat.completions.create(**asked)
        one = await client.chat.completions.create(**asked, parallel_tool_calls=False)
        told = await chunks(client, "{look}{see}", tools=[LOOK], parallel_tool_calls=False)
    names = [[call.function.name for call in made.choices[0].message.tool_calls] for made in (many, one)]
    assert names == [["look", "see"], ["look"]]
    assert sum("tool_calls" in delta for delta in deltas(told)) == 2


async def test_tokens_of_thoughts_and_of_cached_prompts_are_counted(engine):
    async with client_of(engine) as client:
        usages = [
            (await client.chat.completions.create(model="tiny", messages=user("x" * 20 + "[hm]yes"))).usage
            for _ in range(2)
        ]
        told = await chunks(client, "[hm]yes", stream_options={"include_usage": True})
    assert [usage.completion_tokens_details.reasoning_tokens for usage in usages] == [3, 3]  # and what opened them
    assert usages[0].prompt_tokens_details.cached_tokens == 0 < usages[1].prompt_tokens_details.cached_tokens
    assert told[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


async def test_a_conversation_reaches_the_engine_as_it_was_sent(engine, monkeypatch):
    asked = requests_of(type("", (), {"engine": engine})(), monkeypatch)
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    conversation = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "c"},
        {"role": "system", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    async with client_of(engine) as client:
        await client.chat.completions.create(
            model="tiny",
            messages=conversation,
            tools=[LOOK],
            tool_choice="required",
            reasoning_effort="minimal",
            seed=3,
        )
    [request] = asked
    assert [(message.role, message.text) for message in request.messages] == [
        ("system", "a"),
        ("user", "b"),
        ("assistant", ""),
        ("tool", "c"),
        ("system", "d"),
        ("user", "e"),
    ]
    assert request.messages[2].tool_calls == (ToolCall("look", {}, "c1"),)
    assert request.messages[3] == Message("tool", "c", call_id="c1", name="look")
    assert (request.tools, request.tool_choice, request.sampling.seed) == ((LOOK,), "required", 3)
    assert request.reasoning == "low"


async def test_what_the_caller_should_know_is_noted(engine):
    async with client_of(engine) as client:
        made = await client.chat.completions.create(model="tiny", messages=user("hi"), reasoning_effort="high")
        told = await chunks(client, "hi", reasoning_effort="high")
    assert made.note == told[-1]["note"] == NO_EFFORTS
    assert not any("note" in chunk for chunk in told[:-1])


async def test_an_answer_that_is_cut_off_says_so(engine):
    async with client_of(engine) as client:
        made = await client.chat.completions.create(model="tiny", messages=user("hello"), max_tokens=2)
        stopped = await client.chat.completions.create(model="tiny", messages=user("hello"), stop="l")
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("he", "length")
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("he", "stop")


async def test_an_answer_ends_where_the_context_does_and_not_before(engine):
    engine.loader.runner.endless = True
    async with client_of(engine) as client:
        for asked in ({}, {"max_tokens": 32_000}):
            made = await client.chat.completions.create(model="tiny", messages=user("hello"), **asked)
            assert (made.choices[0].finish_reason, made.usage.total_tokens) == ("length", 100)


async def test_a_turn_goes_on_with_a_session_and_a_fork_leaves_its_parent_as_it_was(engine):
    async with client_of(engine) as client:

        async def ask(text, **where):
            return await client.chat.completions.create(model="tiny", messages=user(text), extra_body=where)

        opened = await ask("one", keep=True)
        forked = await ask("two", parent_session_id=opened.session_id)
        turn = await ask("six", session_id=opened.session_id)
        looked = await ask("ten", session_id=opened.session_id, keep=False)
        sneaked = await ask("ten", parent_session_id=opened.session_id, keep=False)
    assert turn.session_id == opened.session_id != forked.session_id
    assert [made.choices[0].message.content for made in (forked, turn, looked)] == ["two", "six", "ten"]
    assert forked.usage.prompt_tokens == turn.usage.prompt_tokens == 10  # the three letters, their echo and the bar
    assert looked.usage.prompt_tokens == sneaked.usage.prompt_tokens == 17
    assert not hasattr(looked, "session_id")
    assert len(engine.thread.sessions) == 2


async def test_a_stream_says_in_which_session_it_is_kept(engine):
    async with client_of(engine) as client:
        opened = await chunks(client, "one", extra_body={"keep": True})
        session = opened[-1]["session_id"]
        forked = await chunks(client, "two", extra_body={"parent_session_id": session})
    assert {session, forked[-1]["session_id"]} == set(engine.thread.sessions)


async def test_a_result_in_a_session_needs_no_more_than_the_calls_id(engine, monkeypatch):
    asked = requests_of(type("", (), {"engine": engine})(), monkeypatch)
    async with client_of(engine) as client:
        made = await client.chat.completions.create(
            model="tiny", messages=user("{look}"), tools=[LOOK], extra_body={"keep": True}
        )
        result = {"role": "tool", "tool_call_id": made.choices[0].message.tool_calls[0].id, "content": "red"}
        await client.chat.completions.create(
            model="tiny", messages=[result], extra_body={"session_id": made.session_id}
        )
    assert asked[-1].messages[0].name == "look"


async def test_answers_to_one_prompt_come_in_their_order_and_end_each_by_itself(embedded):
    asked = {"messages": user("Tell me a story."), "model": "embedded", "n": 3, "temperature": 3.0, "seed": 5}
    async with client_of(embedded.engine, embedded) as client:
        whole = await client.chat.completions.create(**asked, max_tokens=30)
        told = await chunks(client, "", **asked, max_tokens=30, stream_options={"include_usage": True})
        alone = await client.chat.completions.create(**asked | {"n": 1, "seed": 6}, max_tokens=30)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert alone.choices[0].message.content == texts[1]  # seeds count up
    assert ["".join(delta.get("content", "") for delta in deltas(told, i)) for i in range(3)] == texts
    assert [chunk["choices"][0]["index"] for chunk in told[:3]] == [0, 1, 2]
    order = [chunk["choices"][0]["index"] for chunk in told[3:-1]]
    assert order != sorted(order), "answers come one after the other"
    assert told[-1]["usage"]["prompt_tokens"] == whole.usage.prompt_tokens == alone.usage.prompt_tokens


async def test_the_prompt_of_several_answers_is_computed_once():
    service = make_service()
    async with client_of(service.engine, service) as client:
        await client.chat.completions.create(model="tiny", messages=user("x" * 400), n=4, temperature=1, max_tokens=1)
    assert service.engine.loader.runner.num_computed < 2 * 400
    service.engine.close()


async def test_log_probabilities_come_with_their_tokens(embedded):
    asked = {"model": "embedded", "logprobs": True, "top_logprobs": 2}
    async with client_of(embedded.engine, embedded) as client:
        whole = await client.chat.completions.create(messages=user(CODE), **asked)
        told = await chunks(client, CODE, **asked)
    content = whole.choices[0].logprobs.content
    assert "".join(each.token for each in content) == "4096"
    assert b"".join(bytes(each.bytes) for each in content) == b"4096"
    assert all(len(each.top_logprobs) == 2 and each.top_logprobs[0].logprob == each.logprob <= 0 for each in content)
    assert [c.model_dump() for c in content] == told[-1]["choices"][0]["logprobs"]["content"]


class Verdict(BaseModel):
    verdict: Literal["yes", "no"]
    sure: bool


async def test_a_schema_holds_an_answer_and_the_client_parses_it(embedded):
    async with client_of(embedded.engine, embedded) as client:
        asked = {"model": "embedded", "messages": user(CODE), "max_tokens": 60}
        made = await client.chat.completions.parse(**asked, response_format=Verdict)
        held = await client.chat.completions.create(**asked, response_format={"type": "json_object"})
    assert isinstance(made.choices[0].message.parsed, Verdict)
    assert held.choices[0].message.content.startswith("{")


async def test_the_streaming_helper_gets_its_events_of_text_and_calls(embedded):
    async with client_of(embedded.engine, embedded) as client:
        asked = {"model": "embedded", "messages": user("Look up Bob's badge."), "tools": [LOOKUP]}
        async with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        [call] = final.choices[0].message.tool_calls
        assert (call.function.name, call.function.parsed_arguments) == ("lookup", {"key": "Bob's badge"})
        assert final.usage.total_tokens > 0
        assert list(dict.fromkeys(kinds)) == [
            "chunk",
            "content.delta",
            "tool_calls.function.arguments.delta",
            "tool_calls.function.arguments.done",
        ]
        answered = [
            *asked["messages"],
            final.choices[0].message.model_dump(exclude_none=True, exclude={"parsed"}),
            {"role": "tool", "tool_call_id": call.id, "content": "342"},
        ]
        async with client.chat.completions.stream(**asked | {"messages": answered}) as stream:
            texts = [event.content async for event in stream if event.type == "content.done"]
    assert texts == ["342"]


async def test_the_streaming_helper_parses_what_a_schema_holds(embedded):
    asked = {"model": "embedded", "messages": user(CODE), "max_tokens": 60}
    async with client_of(embedded.engine, embedded) as client:
        async with client.chat.completions.stream(**asked, response_format=Verdict) as stream:
            [done] = [event async for event in stream if event.type == "content.done"]
    assert isinstance(done.parsed, Verdict)
