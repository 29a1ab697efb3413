"""The measure of our tools' descriptions: tasks that can be answered, and how answers are scored."""

import argparse
import json

import httpx2
import pytest
from mcp import Client

from benchmarks import choice
from benchmarks.choice import Choice, Task, fits, score
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.api.mcp.tools import make_tools
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from tests.fakes import fake_client

TASKS = choice.read_tasks()
CANCEL = Task("Stop r-1.", "cancel", {"result_id": "r-1"})


def test_forty_tasks_ask_for_every_tool_and_for_arguments_that_it_takes():
    engine = fake_client()
    tools = make_tools(Service(engine, Registry(None)))
    taken = {tool.name: {*tool.parameters["properties"], *tool.option_names} for tool in tools}
    assert engine.close()
    offered = [task for task in TASKS if task.tool in taken]
    assert len(offered) >= 40
    assert {task.tool for task in offered} == set(taken)
    for task in offered:
        assert task.arguments.keys() <= taken[task.tool], task


@pytest.mark.parametrize(
    ("value", "wanted", "right"),
    [
        ("r-1", "r-1", True),
        ("r-2", "r-1", False),
        (3, 3, True),
        (3.0, 3, True),
        (True, 1, False),
        (1, True, False),
        (0, 0, True),
        (None, 0, False),
        ("the LIFT is stuck", {"has": "lift"}, True),
        (["src/app.py"], {"has": "app.py"}, True),
        ([], {"has": "app.py"}, False),
        (["a", "b"], {"length": 2}, True),
        ("ab", {"length": 2}, False),
        ({}, {"given": True}, True),
        (None, {"given": True}, False),
    ],
)
def test_an_argument_is_right_if_it_is_as_the_task_wants_it(value, wanted, right):
    assert fits(value, wanted) == right


def test_a_choice_is_right_with_the_right_tool_and_all_key_arguments():
    assert score(CANCEL, Choice("cancel", {"result_id": "r-1", "more": 1})).has_all
    other = score(CANCEL, Choice("cancel", {"result_id": "r-2"}))
    assert (other.has_tool, other.has_all, other.wrong) == (True, False, ("result_id",))
    assert not score(CANCEL, Choice("get_result", {"result_id": "r-1"})).has_all
    assert not score(Task("Which sessions?", "list_sessions"), Choice()).has_tool
    assert score(Task("", "generate", {"seed": 7}), Choice("generate", {"options": {"seed": 7}})).has_all


def test_the_totals_say_what_was_left_out():
    scores = [score(CANCEL, Choice("cancel", given)) for given in ({"result_id": "r-1"}, {})]
    assert choice.summary(scores, 0) == "right tool 2 of 2; with all key arguments 1 of 2"
    assert choice.summary(scores, 3).endswith("; 3 tasks left out, since their tools are not offered")


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ('{"tool": "cancel", "arguments": {"result_id": "r-1"}}', Choice("cancel", {"result_id": "r-1"})),
        ('{"tool": "cancel", "argum', Choice("cancel")),
        ('{"tool": "can', Choice()),
        ('{"tool": "cancel", "arguments": null}', Choice("cancel")),
    ],
)
def test_of_an_answer_that_was_cut_off_the_tool_counts(text, made):
    assert choice.read_answer(text) == made


CALL = {"function": {"name": "cancel", "arguments": '{"result_id": "r-1"}'}}
CANNED = {
    "openai": {"choices": [{"message": {"content": None, "tool_calls": [CALL]}}]},
    "anthropic": {
        "content": [
            {"type": "text", "text": "I stop it."},
            {"type": "tool_use", "name": "cancel", "input": {"result_id": "r-1"}},
        ]
    },
}
WORDS = {
    "openai": {"choices": [{"message": {"content": "No."}}]},
    "anthropic": {"content": [{"type": "text", "text": "No."}]},
}


@pytest.mark.parametrize("api", CANNED)
async def test_an_endpoint_is_asked_with_all_schemas_and_its_call_is_scored(api, monkeypatch):
    monkeypatch.setenv("CHOICE_KEY", "secret")
    asked = []

    def answer(request):
        asked.append((request.url.path, dict(request.headers), json.loads(request.content)))
        return httpx2.Response(200, json=CANNED[api] if len(asked) == 1 else WORDS[api])

    engine = fake_client()
    options = argparse.Namespace(
        url="http://model/v1" if api == "openai" else "http://model", model="m", api=api, key_env="CHOICE_KEY"
    )
    async with (
        Client(build_server(Service(engine, Registry(None)))) as ours,
        httpx2.AsyncClient(transport=httpx2.MockTransport(answer)) as http,
    ):
        tools = (await ours.list_tools()).tools
        ask = choice.over_http(http, options, "Be brief.", tools)
        scores = await choice.ask_all(ask, [CANCEL, CANCEL], at_once=1)
    assert engine.close()
    assert [one.has_all for one in scores] == [True, False]
    path, headers, body = asked[0]
    assert path == {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}[api]
    assert "secret" in (headers.get("authorization", "") + headers.get("x-api-key", ""))
    assert len(body["tools"]) == len(tools)
    assert "Be brief." in json.dumps(body)
