"""Arguments in the forms in which clients send them, for every argument of every tool."""

import json

import pytest

from mlx_mcp.api.mcp.answer_arguments import BatchArguments, CountArguments, GenerateArguments
from mlx_mcp.api.mcp.deliberate_arguments import DeliberateArguments
from mlx_mcp.api.mcp.model_tools import LoadArguments, UnloadArguments
from mlx_mcp.api.mcp.reason_arguments import ReasonArguments
from mlx_mcp.api.mcp.result_arguments import CancelArguments, GetResultArguments
from mlx_mcp.api.mcp.session_arguments import (
    CloseArguments,
    CreateArguments,
    ForkArguments,
    ListArguments,
    PersistArguments,
)
from mlx_mcp.api.mcp.tools import make_tools
from mlx_mcp.api.mcp.workflow_arguments import SandboxArguments
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from tests.api.mcp.test_tools import connect, engine, generate  # noqa: F401

TOOLS = {
    GenerateArguments: {"prompt": "x"},
    BatchArguments: {"prompts": ["x"]},
    CreateArguments: {"system": "x"},
    ForkArguments: {"session": "s"},
    PersistArguments: {"session": "s"},
    CloseArguments: {"sessions": ["s"]},
    CountArguments: {"prompt": "x"},
    GetResultArguments: {"result_id": "r"},
    CancelArguments: {"result_id": "r"},
    LoadArguments: {"model": "tiny"},
    UnloadArguments: {"model": "tiny"},
    ListArguments: {},
    SandboxArguments: {"code": "1"},
    DeliberateArguments: {"task": "x"},
    ReasonArguments: {"question": "x", "session": "s"},
}
OPTIONAL = [(tool, name) for tool, given in TOOLS.items() for name in tool.model_fields if name not in given]
INTEGERS = [
    (tool, name) for tool in TOOLS for name, each in tool.model_fields.items() if each.annotation in (int, int | None)
]
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
STRUCTURED = [
    (GenerateArguments, "json_schema", {"type": "object"}),
    (GenerateArguments, "stop", ["a", "b"]),
    (GenerateArguments, "logit_bias", {"5": 1.5}),
    (GenerateArguments, "tools", [LOOK]),
    (GenerateArguments, "files", ["a.txt"]),
    (SandboxArguments, "files", ["*.txt", "a.txt"]),
    (GenerateArguments, "messages", SAID),
    (BatchArguments, "prompts", ["a", "[0]"]),
    (CreateArguments, "messages", SAID),
    (ForkArguments, "names", ["a"]),
    (CloseArguments, "sessions", ["a"]),
]


def test_the_cases_are_of_every_tool_that_takes_arguments(engine):  # noqa: F811
    made = {tool.fn_metadata.arg_model for tool in make_tools(Service(engine, Registry(None)))}
    assert {each for each in made if each.model_fields} == set(TOOLS)


@pytest.mark.parametrize(("tool", "name"), OPTIONAL, ids=lambda value: getattr(value, "__name__", value))
def test_null_stands_for_an_argument_that_is_left_out(tool, name):
    assert tool.model_validate(TOOLS[tool] | {name: None}) == tool.model_validate(TOOLS[tool])


@pytest.mark.parametrize(("tool", "name"), INTEGERS, ids=lambda value: getattr(value, "__name__", value))
def test_an_integer_may_be_a_text_or_have_a_point(tool, name):
    number = {"depth": 2, "budget_tokens": 16}.get(name, 8)  # within its bounds
    for given in (str(number), float(number), f"{number}.0"):
        assert getattr(tool.model_validate(TOOLS[tool] | {name: given}), name) == number
    for given in (True, False, "8.5", 8.5, "8_0", "eight", "", float("inf"), [8], "9" * 5000):
        with pytest.raises(ValueError, match=name):
            tool.model_validate(TOOLS[tool] | {name: given})


@pytest.mark.parametrize("name", ["temperature", "top_p", "ttl_s"])
def test_a_truth_value_is_no_number(name):
    tool = CreateArguments if name == "ttl_s" else GenerateArguments
    with pytest.raises(ValueError, match=f"{name}\n.*a number, not true"):
        tool.model_validate(TOOLS[tool] | {name: True})
    assert getattr(tool.model_validate(TOOLS[tool] | {name: "0.5"}), name) == 0.5


@pytest.mark.parametrize(("tool", "name", "value"), STRUCTURED)
def test_a_list_or_an_object_may_be_its_json_text_all_of_it_or_each_entry(tool, name, value):
    meant = tool.model_validate(TOOLS[tool] | {name: value})
    assert tool.model_validate(TOOLS[tool] | {name: json.dumps(value)}) == meant
    if isinstance(value, list) and isinstance(value[0], dict):
        assert tool.model_validate(TOOLS[tool] | {name: [json.dumps(each) for each in value]}) == meant


def test_the_parts_of_a_tool_may_be_texts_too():
    function = LOOK["function"] | {"parameters": json.dumps(LOOK["function"]["parameters"])}
    given = GenerateArguments.model_validate({"tools": [{"type": "function", "function": json.dumps(function)}]})
    assert given.tools == [LOOK]


def test_a_message_may_have_nulls():
    message = {"role": "user", "content": "a", "tool_calls": None, "name": None}
    given = GenerateArguments.model_validate({"prompt": None, "messages": [message]})
    assert given.messages == GenerateArguments.model_validate({"messages": SAID[:1]}).messages


async def test_what_means_nothing_is_refused_by_its_name(engine):  # noqa: F811
    refused = {
        "max_tokens": "many",
        "tools": "look",
        "messages": [{"role": "user", "content": "a", "tool_calls": "no"}],
        "logit_bias": "[1]",
        "json_schema": "{",
    }
    async with connect(engine, "auto") as client:
        for name, value in refused.items():
            result = await generate(client, **{name: value})
            assert result.is_error
            assert f"{name}" in result.content[0].text
        taken = await generate(client, max_tokens="2", stop='["z"]', tools=json.dumps([LOOK]), temperature=None)
    assert taken.structured_content["text"] == "he"


async def test_options_are_taken_in_their_object_beside_it_and_as_json(engine):  # noqa: F811
    async with connect(engine, "auto") as client:
        ways = [{"options": {"stop": ["l"]}}, {"stop": ["l"]}, {"options": '{"stop": "[\\"l\\"]"}'}]
        ways += [{"options": {"stop": ["l"], "seed": None}}, {"options": {"stop": ["l"]}, "stop": ["l"]}]
        for given in ways:
            result = await generate(client, **given)
            assert result.structured_content["text"] == "he", given
        assert (await generate(client, options=None)).structured_content["text"] == "hello"


async def test_options_that_mean_nothing_are_refused_with_what_there_is(engine):  # noqa: F811
    async with connect(engine, "auto") as client:
        for given, words in [
            ({"options": {"sed": 1}}, "did you mean `seed`?"),
            ({"options": ["seed"]}, "`options` is an object"),
            ({"options": {"seed": 1}, "seed": 2}, "`seed` is given twice"),
            ({"options": {"options": {}}}, "options"),
        ]:
            result = await generate(client, **given)
            assert result.is_error, given
            assert words in result.content[0].text
