"""Answers that are held to something, on the engine with MLX: budgets of thoughts, schemas, calls of tools."""

import asyncio
import json

import jsonschema
import pytest
from tokenizers import Tokenizer

from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Grammar, GrammarKind, Reasoning
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import FinishReason
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.models.registry import Registry
from tests.effort import drawn
from tests.engine.test_with_mlx import answer, ask, make_client
from tests.mlx_backend.tokenizers_made import THINKING
from tests.models_made import TEMPLATE, make_model

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
JSON = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A model of random weights whose template opens thoughts, with markers that are tokens of their own."""
    folder = make_model(tmp_path_factory.mktemp("thinker"), template=TEMPLATE + THINKING, vocab_size=340)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return Registry(str(folder)).resolve(None)


@pytest.fixture
def client(thinker):
    client = make_client(Limits(max_running=4), registry=Registry(None, named={"thinker": thinker}))
    yield client
    assert client.close()


def thinking(text, **settings):
    return ask(text, model="thinker", max_tokens=40, logprobs=0, **settings)


def tokens(result):
    return [choice.token_id for choice in result.logprobs]


async def test_thoughts_end_after_exactly_the_budget_whatever_else_runs(client):
    # Greedy rows may run ahead of their tokens, rows with a temperature may not.
    for how in ({}, {"temperature": 1.0, "seed": 5}):
        free = await answer(client, thinking("think", **how))
        assert free.reasoning
        assert free.text == ""
        budgets = (0, 1, 7, 20)
        calls = [answer(client, thinking("think", reasoning_budget=budget, **how)) for budget in budgets]
        beside = [answer(client, thinking(f"and {i}", **how)) for i in range(3)]
        alone = [await answer(client, thinking(f"and {i}", **how)) for i in range(3)]
        ended = await asyncio.gather(*calls, *beside)
        for budget, result in zip(budgets, ended, strict=False):
            assert tokens(result)[:budget] == tokens(free)[:budget]
            assert [choice.text for choice in result.logprobs].index("</think>") == budget
            assert result.text
        assert list(map(tokens, ended[len(budgets) :])) == list(map(tokens, alone))


async def test_a_schema_holds_the_answer_and_not_the_thoughts(client):
    quiet = await answer(client, thinking("hi", grammar=JSON))
    off = await answer(client, thinking("hi", grammar=JSON, reasoning=Reasoning.OFF))
    assert tokens(quiet) == tokens(off)
    first = await answer(client, thinking("hi", grammar=JSON, reasoning=Reasoning.ON, reasoning_budget=6))
    for result in (quiet, off, first):
        jsonschema.validate(json.loads(result.text), SCHEMA)
        assert result.finish_reason is FinishReason.STOP
        assert result.notes == ()
    assert quiet.reasoning == ""
    assert [choice.text for choice in first.logprobs].index("</think>") == 6


async def test_a_schema_comes_even_where_the_model_would_end_its_turn_in_its_thoughts(client, thinker):
    model = client.loader.prepare(thinker, lambda progress: None)
    (stop,) = model.tokenizer.stop_ids
    bias = ((stop, 100.0),)
    result = await answer(
        client, thinking("hi", grammar=JSON, reasoning=Reasoning.ON, reasoning_budget=6, logit_bias=bias)
    )
    jsonschema.validate(json.loads(result.text), SCHEMA)


# Tools, on the built-in model


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


LOOKUP = tool("lookup", key={"type": "string", "maxLength": 30})
WEATHER = tool("weather", city={"enum": ["Paris", "Oslo"]}, day={"type": "integer", "minimum": 1, "maximum": 7})
TOOLS = (LOOKUP, WEATHER)
CALL_WEATHER = "Call weather with city Berlin and day Monday."


def obeys(call):
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
    jsonschema.validate(call.arguments, schemas[call.name])
    return True


@pytest.mark.long
async def test_arguments_obey_the_schema_once_a_call_has_begun(client):
    said = await answer(client, ask("Look up Alice's city.", tools=TOOLS))
    assert said.tool_calls == (ToolCall("lookup", {"key": "Alice's city"}),)
    free = await answer(client, ask("Hello.", tools=TOOLS))
    assert (free.text, free.tool_calls) == ("Hello.", ())
    greedy = ask(CALL_WEATHER, tools=TOOLS)
    others = [ask(CALL_WEATHER, tools=TOOLS, temperature=1.5, seed=seed) for seed in range(drawn(5, least=3))]
    results = await asyncio.gather(*(answer(client, each) for each in (greedy, *others)))
    assert results[0].tool_calls
    assert all(obeys(call) for result in results for call in result.tool_calls)


@pytest.mark.parametrize("choice", ["required", "weather", "lookup"])
async def test_a_call_can_be_required_of_any_tool_or_of_one(client, choice):
    asked = [
        ask(text, tools=TOOLS, tool_choice=choice, temperature=temperature, seed=1, max_tokens=100)
        for text in ("Look up Alice's city.", CALL_WEATHER, "Hello.")
        for temperature in (0.0, 1.0)
    ]
    for result in await asyncio.gather(*(answer(client, each) for each in asked)):
        first = result.tool_calls[0]
        assert choice in ("required", first.name)
        assert obeys(first)


async def test_none_calls_nothing_and_is_each_turns_own(client):
    opened = await answer(client, ask("Hello.", tools=TOOLS, opens=SessionOptions()))
    turn = {"session": opened.session.session_id, "keep": False}
    for choice, num_calls in (("none", 0), ("auto", 1), ("weather", 1)):
        result = await answer(client, ask("Look up Alice's city.", tool_choice=choice, **turn))
        assert len(result.tool_calls) == num_calls
        assert "<tool_call>" not in result.text


async def test_a_choice_that_cannot_be_is_refused_with_what_can(client):
    for choice, tools, words in (
        ("find", TOOLS, "auto, none, required or one of: lookup, weather"),
        ("required", (), "there are no tools"),
        ("required", (tool("f", x={"not": {}}),), "not supported: #/properties/x/not"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            await answer(client, ask("Hello.", tools=tools, tool_choice=choice))
    # Where nothing is required, what has no grammar is free.
    result = await answer(client, ask("Call f with x 5.", tools=(tool("f", x={"not": {}}),)))
    assert result.tool_calls[0].name == "f"


async def test_a_loop_of_calls_and_results_in_one_session_computes_only_what_is_new(client):
    asked = await answer(client, ask("Look up Bob's badge.", tools=TOOLS, opens=SessionOptions()))
    known = asked.prompt_tokens + asked.completion_tokens
    result = Message("tool", "342", name="lookup")
    request = ask("", session=asked.session.session_id)
    told = await answer(client, type(request)((result,), session=asked.session.session_id))
    assert told.text == "342"
    assert told.prompt_tokens - told.cached_tokens <= told.prompt_tokens - known + 1
