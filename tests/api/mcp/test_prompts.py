"""The prompts as a host's model reads them: every call that they show is one that the tools take."""

import json
import re

import pytest
from mcp import Client, MCPError

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from tests.fakes import fake_client

GIVEN = {
    "delegate": {"task": "Sum up the notes."},
    "fan_out": {"question": "Who is late?", "files": "a.txt, b.txt"},
    "review": {"subject": "a.py"},
    "label_rows": {"rows": "rows.csv", "labels": "good, bad"},
}
CALL = re.compile(r"`(\w+)\((.*?)\)`")
ARGUMENT = re.compile(r"(\w+)=")


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


@pytest.fixture(params=["auto", "legacy"])
def connect(engine, request):
    return lambda: Client(build_server(Service(engine, Registry(None))), mode=request.param)


async def told(client, name, **arguments):
    (message,) = (await client.get_prompt(name, arguments)).messages
    assert message.role == "user"
    return message.content.text


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("more", [{}, {"model": "small"}], ids=["default model", "a model"])
async def test_every_call_that_a_prompt_shows_is_one_that_its_tool_takes(connect, name, more):
    async with connect() as client:
        tools = {tool.name: tool.input_schema for tool in (await client.list_tools()).tools}
        text = await told(client, name, **GIVEN[name], **more)
    shown = CALL.findall(text)
    assert shown
    for tool, arguments in shown:
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', arguments)
        assert set(ARGUMENT.findall(outside)) <= tools[tool]["properties"].keys(), tool
    assert ("small" in text) is bool(more)
    for value in GIVEN[name].values():
        assert value.split(",")[0] in text
    assert len(text) < 1800


async def test_there_are_the_prompts_that_are_tried_here_each_with_a_title_an_icon_and_described_arguments(connect):
    async with connect() as client:
        prompts = (await client.list_prompts()).prompts
    assert {prompt.name for prompt in prompts} == GIVEN.keys()
    for prompt in prompts:
        assert prompt.title
        assert prompt.icons
        assert all(argument.description for argument in prompt.arguments)
        assert {argument.name for argument in prompt.arguments if argument.required} == GIVEN[prompt.name].keys()


@pytest.mark.parametrize(
    ("labels", "schema"),
    [
        ("good, bad", {"enum": ["good", "bad"]}),
        ('{"type": "object", "properties": {"label": {"type": "integer"}}}', {"type": "integer"}),
    ],
)
async def test_labels_become_a_schema_that_answers_obey(connect, labels, schema):
    async with connect() as client:
        text = await told(client, "label_rows", rows="rows.csv", labels=labels)
    shown = json.loads(re.search(r"json_schema=(\{.*\})\)`", text)[1])
    assert (shown["type"], shown["properties"]["label"]) == ("object", schema)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("delegate", {}, "The prompt delegate needs task: give it, and ask again"),
        ("fan_out", {"question": "x"}, "needs files"),
        ("fan_out", {"question": "x", "files": " , "}, "`files` is empty: give at least one, separated by commas"),
        ("label_rows", {"rows": "x", "labels": "{"}, r"`labels` is not JSON .*: give a JSON schema, or labels"),
        ("label_rows", {"rows": "x", "labels": '{"type": "string"}'}, "not the schema of an object"),
        ("nothing", {}, r"Unknown prompt: .*\. prompts/list has those there are"),
    ],
)
async def test_a_prompt_that_is_asked_for_wrong_is_refused_with_what_to_do(connect, name, arguments, says):
    async with connect() as client:
        with pytest.raises(MCPError, match=says) as error:
            await client.get_prompt(name, arguments)
    assert error.value.error.code == -32602
