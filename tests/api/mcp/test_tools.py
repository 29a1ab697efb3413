"""The tools as an in-memory MCP client sees them, in both protocol eras, over fakes."""

import asyncio
import contextlib
import json

import pytest
from mcp import Client, MCPError

from mlx_mcp.api.mcp import calls
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Grammar, GrammarKind, Reasoning
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.errors import ModelError
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from tests.engine.test_client import until
from tests.fakes import NO_EFFORTS, fake_client


@pytest.fixture(params=["auto", "legacy"])
def mode(request):
    return request.param


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


def connect(engine, mode, **options):
    return Client(build_server(Service(engine, Registry(None))), mode=mode, **options)


async def generate(client, prompt="hello", **arguments):
    return await client.call_tool("generate", {"prompt": prompt, "model": "tiny"} | arguments)


def told(result):
    """What a host's model sees that is shown the text blocks only: the answers, and all else that the result says."""
    *texts, rest = [block.text for block in result.content]
    return texts, json.loads(rest)


async def test_generate_returns_the_text_and_a_small_structured_result(engine, mode):
    async with connect(engine, mode) as client:
        result = await generate(client)
    assert told(result)[0] == ["hello"]
    assert result.structured_content == {
        "text": "hello",
        "finish_reason": "stop",
        "model": "tiny",
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "restored_tokens": 0,
        "computed_tokens": 5,
        "completion_tokens": 5,
    }


async def test_reasoning_and_tool_calls_come_apart_from_the_text(engine, mode):
    look = {"type": "function", "function": {"name": "look"}}
    async with connect(engine, mode) as client:
        result = await generate(client, "[hm]yes{look}", tools=[look])
    assert told(result)[0] == ["yes"]
    assert result.structured_content == {
        "text": "yes",
        "finish_reason": "tool_calls",
        "model": "tiny",
        "prompt_tokens": 13,
        "cached_tokens": 0,
        "restored_tokens": 0,
        "computed_tokens": 13,
        "completion_tokens": 13,
        "reasoning": "hm",
        "tool_calls": [{"name": "look", "arguments": {}}],
    }


@pytest.mark.parametrize(("given", "reasoning"), [(True, "on"), (False, "off"), ("high", "high"), (None, None)])
async def test_earlier_callers_switch_reasoning_with_true_and_false(engine, monkeypatch, given, reasoning):
    asked = []
    generate_for_real = engine.generate
    monkeypatch.setattr(engine, "generate", lambda request: asked.append(request) or generate_for_real(request))
    async with connect(engine, "auto") as client:
        assert not (await generate(client, reasoning=given)).is_error
        assert (await generate(client, reasoning="loud")).is_error
    assert [request.reasoning for request in asked] == [reasoning]


async def test_what_a_caller_should_know_is_noted_once_however_many_branches_have_it(engine, mode):
    async with connect(engine, mode) as client:
        one = await generate(client, reasoning="low")
        batch = {"prompts": ["one", "two"], "reasoning": "low", "model": "tiny"}
        many = (await client.call_tool("generate_batch", batch)).structured_content
    assert one.structured_content["note"] == many["note"] == NO_EFFORTS
    assert told(one)[1]["note"] == NO_EFFORTS
    assert not any("note" in branch for branch in many["results"])


LOOK = {"type": "function", "function": {"name": "look"}}
CALLS = {
    "an answer": ({"prompt": "hello"}, ["hello"]),
    "a kept one": ({"prompt": "hello", "keep": True}, ["hello"]),
    "one that was cut off": ({"prompt": "hello", "max_tokens": 2}, ["he"]),
    "one beside a call": ({"prompt": "[hm]yes{look}", "tools": [LOOK]}, ["yes"]),
    "a lone call": ({"prompt": "{look}", "tools": [LOOK]}, []),
    "one of the built-in model": ({"prompt": "hello", "model": None}, ["hello"]),
    "one with log-probabilities": ({"prompt": "hello", "logprobs": 1}, ["hello"]),
}


@pytest.mark.parametrize(("arguments", "texts"), CALLS.values(), ids=CALLS)
async def test_text_blocks_alone_say_all_that_the_structured_result_says_and_the_text_once(
    engine, mode, arguments, texts
):
    async with connect(engine, mode) as client:
        result = await generate(client, **arguments)
    seen, rest = told(result)
    assert seen == texts
    assert rest | {"text": "".join(texts)} == result.structured_content
    assert all(block.text for block in result.content)
    assert "text" not in rest


async def test_a_model_that_sees_text_blocks_only_can_go_on_from_every_answer_of_a_batch(engine, mode):
    async with connect(engine, mode) as client:
        batch = {"prompts": ["one", "a" * 101, "{look}"], "keep": True, "model": "tiny"}
        result = await client.call_tool("generate_batch", batch)
        texts, rest = told(result)
        assert texts == ["one", "(no text)", "(no text)"]
        one, failed, called = rest["results"]
        assert one["finish_reason"] == "stop"
        assert "Shorten the prompt" in failed["error"]
        assert called["tool_calls"] == [{"name": "look", "arguments": {}}]
        assert (await generate(client, "two", session=one["session"])).structured_content["text"] == "two"
    for told_, whole in zip(rest["results"], result.structured_content["results"], strict=True):
        assert {key: value for key, value in whole.items() if key != "text" and value != 0} == told_


async def test_every_other_tool_says_in_a_text_block_what_its_structured_result_says(engine, mode):
    async with connect(engine, mode) as client:
        for tool, arguments in (
            ("create_session", {"system": "S", "name": "root", "model": "tiny"}),
            ("fork_session", {"session": "root", "names": ["a", "b"]}),
            ("list_sessions", {}),
            ("list_models", {}),
            ("close_session", {"all": True}),
        ):
            result = await client.call_tool(tool, arguments)
            (block,) = result.content
            assert json.loads(block.text) == result.structured_content


async def test_progress_counts_the_prompt_and_then_the_tokens_of_the_answer(engine, mode, monkeypatch):
    monkeypatch.setattr(calls, "PROGRESS_INTERVAL_S", 0.0)
    monkeypatch.setattr("mlx_mcp.service.jobs.QUIET_S", 0.0)
    heard = []

    async def hear(progress, total, message):
        heard.append((round(progress), total))

    async with connect(engine, mode) as client:
        arguments = {"prompt": "hello", "model": "tiny", "max_tokens": 50}
        await client.call_tool("generate", arguments, progress_callback=hear)
    assert [progress for progress, total in heard if total == 55][-5:] == [6, 7, 8, 9, 10]


async def test_every_argument_reaches_the_engine(engine, mode, monkeypatch):
    asked = []
    generate_for_real = engine.generate
    monkeypatch.setattr(engine, "generate", lambda request: asked.append(request) or generate_for_real(request))
    given = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "seed": 5,
        "logprobs": 2,
        "reasoning_budget": 9,
    }
    async with connect(engine, mode) as client:
        others = {"logit_bias": {"101": -1}, "json_schema": {"type": "object"}, "reasoning": "low"}
        assert not (await generate(client, **given, **others)).is_error
        assert not (await generate(client, stop=["x"])).is_error
    request, stopping = asked
    assert request.sampling == Sampling(**given, logit_bias=((101, -1.0),))
    assert request.reasoning is Reasoning.LOW
    assert request.grammar == Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
    assert stopping.sampling.stop == ("x",)


async def test_text_that_reads_as_json_stays_text_and_null_is_as_good_as_nothing(engine):
    async with connect(engine, "auto") as client:
        result = await generate(client, "?", system='{"rules": 1}', regex="[0]", grammar=None, model="tiny", stop=None)
        default = await generate(client, system=None, model=None, regex=None)
    assert result.structured_content["text"] == '{"rules": 1}?'
    assert default.structured_content["model"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"json_schema": {}, "regex": "a"}, "one of json_schema, regex and grammar"),
        ({"regex": "malformed"}, "malformed"),
        ({"grammar": "a", "stop": ["x"]}, "stop"),
        ({"grammar": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"2000000": 1}}, "logit_bias"),
        ({"queue": True}, "`queue` waits for a turn of a session, and there is no `session`"),
        ({"queue": True, "keep": True}, "`queue`"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"reasoning_budget": -1}, "reasoning_budget"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
            'no call: {"name": "f"}; write it as it came',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}]},
            "it as it came in `tool_calls`",
        ),
        ({"messages": [{"role": "tool", "name": "f", "content": "x"}]}, "right after the answer that asked for it"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_the_arguments_name(engine, arguments, words):
    async with connect(engine, "auto") as client:
        result = await generate(client, **arguments)
    assert result.is_error
    assert words in result.content[0].text


async def test_the_tools_say_what_hosts_need_to_know(engine, mode):
    async with connect(engine, mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert list(tools) == [
        "generate",
        "generate_batch",
        "deliberate",
        "get_result",
        "cancel",
        "create_session",
        "fork_session",
        "persist_session",
        "list_sessions",
        "close_session",
        "sandbox_run",
        "reason_over",
        "list_models",
        "load_model",
        "unload_model",
        "count_tokens",
    ]
    for tool in tools.values():
        assert tool.annotations.read_only_hint is (tool.name not in ("cancel", "close_session", "persist_session"))
        assert tool.annotations.destructive_hint is (tool.name in ("cancel", "close_session"))
        assert tool.annotations.open_world_hint is False
        assert 0 < len(tool.description) < 4000
        assert tool.output_schema["type"] == "object"
        assert tool.input_schema["additionalProperties"] is False
        assert all("description" in p for p in tool.input_schema["properties"].values())
    assert "required" not in tools["generate"].input_schema  # results of tools need no prompt


async def test_the_tools_of_every_prompt_take_at_most_9000_characters_of_it(engine, mode):
    async with connect(engine, mode) as client:
        tools = (await client.list_tools()).tools
    daily = [tool for tool in tools if (tool.meta or {}).get("anthropic/alwaysLoad")]
    assert [tool.name for tool in daily] == [
        "generate",
        "generate_batch",
        "get_result",
        "create_session",
        "fork_session",
    ]
    told = [f"{tool.name}{tool.description}{json.dumps(tool.input_schema)}" for tool in daily]
    assert sum(map(len, told)) <= 9_000
    schemas = [json.dumps(tool.input_schema) for tool in tools]
    for schema in schemas:
        assert not any(word in schema for word in ('"title"', '"null"', ": null", '"default": ""'))
    system, keep = (tools[0].input_schema["properties"][name] for name in ("system", "keep"))
    assert "default" not in system
    assert keep["type"] == "boolean"
    assert "reasoning (off, on, low, medium, high)" in tools[0].input_schema["properties"]["options"]["description"]


async def test_the_server_says_its_name_version_and_instructions(engine, mode):
    async with connect(engine, mode) as client:
        assert client.server_info.name == "mlx-mcp"
        assert client.server_info.version
        assert "list_models" in client.instructions
        assert "create_session" in client.instructions
        assert len(client.instructions) < 4000


async def test_system_comes_before_prompt(engine, mode):
    async with connect(engine, mode) as client:
        result = await generate(client, "world", system="hello ")
    assert result.structured_content["text"] == "hello world"


@pytest.mark.parametrize("given", ["look", {"type": "function", "function": {"name": "look"}}, None])
async def test_a_choice_of_a_tool_reaches_the_engine(engine, monkeypatch, given):
    asked = []
    generate_for_real = engine.generate
    monkeypatch.setattr(engine, "generate", lambda request: asked.append(request) or generate_for_real(request))
    async with connect(engine, "auto") as client:
        assert not (await generate(client, tools=[LOOK], tool_choice=given)).is_error
    assert asked[0].tool_choice == ("look" if given else "auto")


async def test_messages_come_before_the_prompt_and_may_be_all_there_is(engine, mode, monkeypatch):
    asked = []
    generate_for_real = engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda request: asked.append(request.messages) or generate_for_real(request)
    )
    call = {"name": "look", "arguments": {"at": "x"}, "id": "1"}
    openai = {"type": "function", "id": "1", "function": {"name": "look", "arguments": '{"at": "x"}'}}
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call, openai]}]
    result = {"role": "tool", "content": "b", "name": "look", "call_id": "1"}
    async with connect(engine, mode) as client:
        whole = await generate(client, "c", messages=[*before, result])
        alone = await client.call_tool("generate", {"model": "tiny", "messages": [*before, result]})
        kept = await generate(client, "{look}", keep=True)
        session = kept.structured_content["session"]
        turn = await client.call_tool("generate", {"session": session, "messages": [result]})
    assert [r.structured_content["text"] for r in (whole, alone, turn)] == ["abc", "ab", "b"]
    as_called = ToolCall("look", {"at": "x"}, "1")
    read = (Message("user", "a"), Message("assistant", tool_calls=(as_called, as_called)))
    came = Message("tool", "b", name="look", call_id="1")
    assert asked[0] == (*read, came, Message("user", "c"))
    assert (asked[1], asked[3]) == ((*read, came), (came,))


async def test_when_nothing_is_configured_the_result_says_who_answered_and_how_to_choose(engine, mode):
    async with connect(engine, mode) as client:
        result = await client.call_tool("generate", {"prompt": "x"})
        named = await generate(client)
    assert "--model" in result.structured_content["note"]
    assert "note" not in named.structured_content


async def test_list_models_says_what_there_is_and_what_is_loaded(engine, mode):
    async with connect(engine, mode) as client:
        result = await client.call_tool("list_models", {})
    (entry,) = result.structured_content["models"]
    assert (entry["name"], entry["default"], entry["loaded"]) == ("embedded", True, False)
    assert 0 < entry["weights_mb"] <= 4
    assert entry["context_tokens"] >= 2048


BAD = [
    ({"prompt": ""}, "The prompt is empty. Say in `prompt` what the model should do"),
    ({"prompt": "  "}, "prompt is empty"),
    ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens: Input should be less than or equal to 131072"),
    ({"max_tokens": 100_000}, "Lower max_tokens to 95 or less, or shorten the prompt"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "a" * 101}, "Shorten the prompt"),
    ({"model": "none"}, "Call list_models"),
    ({"model": "../../etc/passwd"}, "Call list_models"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"stop": [""]}, "stop string is empty"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"seed": -1}, "seed"),
    ({"max_token": None}, "max_token: Extra inputs are not permitted"),
    ({"max_token": 5}, "max_token: Extra inputs are not permitted"),
    ({"prompt": None}, "prompt"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[str(a)[:40] for a, _ in BAD])
async def test_a_bad_call_is_told_what_to_change_and_the_server_goes_on(engine, mode, arguments, words):
    async with connect(engine, mode) as client:
        result = await generate(client, **arguments)
        assert result.is_error
        assert words in result.content[0].text
        assert "pydantic" not in result.content[0].text
        assert (await generate(client)).structured_content["text"] == "hello"


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        (
            "generate",
            {"prompt": "x", "max_token": 5},
            ["max_token", "did you mean `max_tokens`?", "generate takes prompt,"],
        ),
        ("generate", {"prompt": "x", "maxTokens": 5}, ["did you mean `max_tokens`?"]),
        ("generate", {"promt": "x"}, ["did you mean `prompt`?"]),
        ("generate", {"prompt": "x", "zzz": 1}, ["zzz: Extra inputs", "takes prompt, messages, session, keep"]),
        ("generate_batch", {"prompt": "x"}, ["did you mean `prompts`?", "prompts, n, session"]),
        ("fork_session", {"session": "s", "nmaes": ["a"]}, ["did you mean `names`?"]),
        (
            "create_session",
            {"messages": [{"role": "user", "contents": "S"}]},
            ["did you mean `content`?", "role, content"],
        ),
        ("list_models", {"name": "x"}, ["list_models takes nothing"]),
    ],
)
async def test_an_unknown_argument_is_told_what_was_probably_meant_and_what_there_is(
    engine, mode, tool, arguments, words
):
    async with connect(engine, mode) as client:
        result = await client.call_tool(tool, arguments)
    assert result.is_error
    assert [word for word in words if word not in result.content[0].text] == []
    assert f"{tool} was not called right: " in result.content[0].text
    assert "Correct the arguments and call again" in result.content[0].text
    assert "\n" not in result.content[0].text


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("generate", {"prompt": "a" * 101, "model": "tiny"}),
        ("generate", {"prompt": "a" * 100, "model": "tiny"}),
        ("generate_batch", {"prompts": ["a" * 101], "model": "tiny"}),
        ("create_session", {"system": "a" * 101, "model": "tiny"}),
    ],
)
async def test_a_prompt_that_is_too_long_alone_says_nothing_of_a_max_tokens_that_nobody_gave(
    engine, mode, tool, arguments
):
    async with connect(engine, mode) as client:
        text = (await client.call_tool(tool, arguments)).content[0].text
        given = (await generate(client, "a" * 99, max_tokens=2)).content[0].text
    assert "tokens, but the model's context is 100 tokens. Shorten the prompt" in text
    assert "max_tokens" not in text
    assert "and max_tokens is 2, but" in given


async def test_what_there_is_is_advertised_in_both_eras_and_that_it_may_change(engine, mode):
    async with connect(engine, mode) as client:
        capabilities = client.server_capabilities
    for each in (capabilities.tools, capabilities.prompts, capabilities.resources):
        assert each.list_changed
    assert capabilities.resources.subscribe
    assert capabilities.completions is not None


async def test_an_unknown_prompt_or_resource_is_answered_with_the_code_of_the_protocols_version(engine, mode, caplog):
    async with connect(engine, mode) as client:
        with pytest.raises(MCPError, match="Unknown prompt: 'nobody'") as prompt:
            await client.get_prompt("nobody")
        with pytest.raises(MCPError, match="mlx://nobody") as resource:
            await client.read_resource("mlx://nobody")
    assert prompt.value.error.code == -32602
    assert resource.value.error.code == (-32602 if mode == "auto" else -32002)
    assert resource.value.error.data == {"uri": "mlx://nobody"}
    assert [record for record in caplog.records if record.exc_info] == []


async def test_a_missing_prompt_is_named(engine, mode):
    async with connect(engine, mode) as client:
        result = await client.call_tool("generate", {})
    assert result.is_error
    assert "Say in `prompt` what the model should do" in result.content[0].text


async def test_a_model_that_cannot_load_says_why(engine, mode):
    engine.loader.fail = ModelError("it has no config.json")
    async with connect(engine, mode) as client:
        result = await generate(client)
    assert result.is_error
    assert "no config.json" in result.content[0].text


async def test_a_dead_engine_is_a_protocol_error(engine, mode):
    engine.close()
    async with connect(engine, mode) as client:
        with pytest.raises(MCPError, match="restart the server"):
            await generate(client)


async def test_eight_calls_at_once_on_one_connection_each_get_their_own_answer(engine, mode):
    async with connect(engine, mode) as client:
        results = await asyncio.gather(*(generate(client, f"text {i}") for i in range(8)))
    assert [r.structured_content["text"] for r in results] == [f"text {i}" for i in range(8)]
    assert max(len(step.decode) for step in engine.loader.runner.steps) >= 2


async def test_progress_rises_through_every_phase_and_says_what_happens(engine, mode, monkeypatch):
    monkeypatch.setattr(calls, "PROGRESS_INTERVAL_S", 0.0)
    monkeypatch.setattr("mlx_mcp.service.jobs.QUIET_S", 0.0)
    seen = []

    async def show(progress, total, message):
        seen.append((progress, total, message))

    async with connect(engine, mode) as client:
        await client.call_tool("generate", {"prompt": "hello", "model": "tiny"}, progress_callback=show)
    values = [progress for progress, _, _ in seen]
    assert values == sorted(set(values))
    words = " / ".join(message for _, _, message in seen)
    for phase in ("loading tiny", "queued", "reading the prompt", "hell"):
        assert phase in words


async def test_a_call_that_ends_at_once_says_nothing_of_its_progress(engine, mode, monkeypatch):
    monkeypatch.setattr("mlx_mcp.service.jobs.QUIET_S", 5.0)
    seen = []

    async def show(progress, total, message):
        seen.append(message)

    async with connect(engine, mode) as client:
        await client.call_tool("generate", {"prompt": "hello", "model": "tiny"}, progress_callback=show)
    assert seen == []


async def test_progress_comes_at_most_ten_times_a_second(engine, mode):
    engine.loader.runner.endless = True
    seen = []

    async def show(progress, total, message):
        seen.append(message)

    async with connect(engine, mode) as client:
        began = asyncio.get_running_loop().time()
        arguments = {"prompt": "hello", "model": "tiny", "max_tokens": 90}
        await client.call_tool("generate", arguments, progress_callback=show)
        seconds = asyncio.get_running_loop().time() - began
    assert len(seen) <= 10 * seconds + 2
    assert all(len(message) <= 200 for message in seen)


async def held(engine):
    """A model in memory whose next step waits until the gate opens."""
    engine.loader.runner.endless = True
    async with connect(engine, "auto") as client:
        await generate(client, max_tokens=1)
    engine.loader.runner.steps.clear()
    engine.loader.runner.gate.clear()


async def freed_within_a_step(engine):
    """Open the gate and see that the step in flight was the row's last."""
    runner = engine.loader.runner
    steps = len(runner.steps)
    await until(lambda: engine.thread._inbox)  # the cancel was sent while the step was still being computed
    runner.gate.set()
    await until(lambda: engine.stats.rows == 0 and engine.stats.running == 0)
    assert len(runner.steps) == steps


async def test_a_client_that_cancels_frees_its_row_within_a_step(engine, mode):
    await held(engine)
    async with connect(engine, mode) as client:
        call = asyncio.create_task(generate(client, max_tokens=90))
        await until(lambda: engine.loader.runner.steps)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        await freed_within_a_step(engine)


async def test_a_client_that_times_out_frees_its_row_within_a_step(engine, mode):
    await held(engine)
    async with connect(engine, mode) as client:
        arguments = {"prompt": "abc", "model": "tiny", "max_tokens": 90}
        with pytest.raises(MCPError, match=r"(?i)timed? ?out"):
            await client.call_tool("generate", arguments, read_timeout_seconds=0.2)
        await freed_within_a_step(engine)


async def test_tokens_are_counted_as_the_model_would_get_them(engine, mode):
    async with connect(engine, mode) as client:
        counted = (await client.call_tool("count_tokens", {"prompt": "hello", "model": "tiny"})).structured_content
        answer = (await generate(client)).structured_content
        assert counted == {
            "tokens": answer["prompt_tokens"],
            "model": "tiny",
            "context_tokens": 100,
            "left_tokens": 100 - answer["prompt_tokens"],
        }
        made = await client.call_tool("create_session", {"system": "you are", "model": "tiny"})
        arguments = {"prompt": "hello", "session": made.structured_content["session"]}
        counted = (await client.call_tool("count_tokens", arguments)).structured_content
        answer = (await client.call_tool("generate", arguments)).structured_content
        assert counted["tokens"] == answer["prompt_tokens"]
        counted = (await client.call_tool("count_tokens", {"prompt": "x" * 500, "model": "tiny"})).structured_content
        assert (counted["tokens"], counted["left_tokens"]) == (500, 0)


async def test_an_unknown_tool_is_answered_with_the_one_that_was_meant(engine, mode):
    async with connect(engine, mode) as client:
        for given, meant in [
            ("generate_text", "generate"),
            ("forksession", "fork_session"),
            ("counttoken", "count_tokens"),
        ]:
            result = await client.call_tool(given, {})
            assert result.is_error
            assert f"Did you mean {meant!r}?" in result.content[0].text
        result = await client.call_tool("xyzzy", {})
        assert "Call one of generate, generate_batch" in result.content[0].text
        assert "Did you mean" not in result.content[0].text
