"""The tool `deliberate` as an in-memory MCP client sees it."""

import asyncio
import json
import threading

import pytest
from mcp import Client

from mlx_mcp.api.mcp.deliberate_arguments import DeliberateArguments, GivenBranch
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from mlx_mcp.workflows.deliberate.task import Branch
from tests.engine.test_client import until
from tests.fakes import FakeLoader, fake_client

NAMES = "Alice Bob Carol Dave Erin Frank Grace Henry Iris Jack".split()
COLORS = "red blue green yellow purple orange black white brown pink".split()


@pytest.fixture
def engine():
    engine = fake_client(FakeLoader(context_tokens=6000))
    yield engine
    assert engine.close()


def connect(engine):
    return Client(build_server(Service(engine, Registry(None))))


@pytest.mark.long
async def test_eight_branches_over_one_context_with_the_built_in_model():
    """Each recalls the fact, and computes no more than its own tail."""
    facts = [f"{name}'s badge is {37 * i + 100}." for i, name in enumerate(NAMES)]
    facts += [f"{name}'s color is {color}." for name, color in zip(NAMES, COLORS, strict=True)]
    engine, registry = wire(Config())
    try:
        async with Client(build_server(Service(engine, registry))) as client:

            async def call(tool, **arguments):
                result = await client.call_tool(tool, arguments)
                assert not result.is_error, result.content
                return result.structured_content

            context = (await call("count_tokens", system=" ".join(facts), prompt="?"))["tokens"]
            made = await call(
                "deliberate", task="What is Dave's badge?", system=" ".join(facts), n=8, max_tokens=8, seed=1
            )
            sessions = {branch["session"] for branch in made["branches"]}
            assert {each["session"] for each in (await call("list_sessions"))["sessions"]} == {
                *sessions,
                made["session"],
            }
    finally:
        assert engine.close()
    assert [branch["text"] for branch in made["branches"]].count("211") >= 7
    assert len(sessions) == 8
    tails = [branch["computed_tokens"] for branch in made["branches"]]
    assert context > 150
    assert max(tails) <= 20
    assert made["calls"]["cached_tokens"] >= 9 * (context - 4), "of eight branches and the judge"


async def test_a_deliberation_that_goes_on_can_be_followed_and_cancelled(engine):
    runner, steps = engine.loader.runner, threading.Semaphore(50)  # then the engine waits
    runner.endless, runner.gate.wait = True, lambda seconds: steps.acquire(timeout=seconds)
    async with connect(engine) as client:
        given = {"task": "x", "system": "S.", "branches": ["a", "b", "c"], "max_tokens": 1900, "wait_s": 0}
        began = (await client.call_tool("deliberate", given)).structured_content
        assert began["status"] == "running"
        await until(lambda: engine.stats.rows == 3)
        result_id = {"result_id": began["result_id"]}
        on = (await client.call_tool("get_result", result_id | {"wait_s": 0.2})).structured_content
        assert on["progress"].startswith("0 of 3 done")
        cancelling = asyncio.create_task(client.call_tool("cancel", result_id))
        await asyncio.sleep(0)
        steps.release(100)  # fewer than the branches want
        assert (await cancelling).structured_content["status"] == "cancelled"
        await until(lambda: engine.stats.rows == 0)
        assert (await client.call_tool("list_sessions", {})).structured_content["sessions"] == []


async def test_what_is_told_of_branches_is_short_and_says_where_the_rest_is(engine):
    async with connect(engine) as client:
        given = {"task": "x" * 1500, "branches": ["a", {"role": "b", "timeout_s": 60}], "max_tokens": 1600}
        result = await client.call_tool("deliberate", given)
    made = result.structured_content
    assert "max_tokens is 1600" in made["error"], "the judge's prompt is too long, and what there is is not lost"
    first = made["branches"][0]
    assert (len(first["text"]), first["chars"], first["role"]) == (1000, 1503, "a")
    assert json.loads(result.content[-1].text)["branches"] == made["branches"]


def test_a_branch_is_a_role_or_an_object_and_n_counts_each():
    given = DeliberateArguments.model_validate(
        {"task": "t", "branches": ["a", {"role": "b", "model": "m", "temperature": "0.5", "seed": 3}], "seed": 7}
    )
    assert given.to_task().branches == (Branch("a", seed=7), Branch("b", "m", 0.5, 3))
    assert isinstance(given.branches[1], GivenBranch)
    alike = DeliberateArguments.model_validate({"task": "t"}).to_task()
    assert [branch.temperature for branch in alike.branches] == [0.8] * 5
    assert len(DeliberateArguments.model_validate({"task": "t", "branches": ["a"], "n": 3}).to_task().branches) == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"task": "x", "judge": "debate"}, "judge: Input should be 'merge', 'vote', 'pick' or 'split'"),
        (
            {"task": "x", "branches": [{"rolle": "a"}]},
            "branches.0.rolle: Extra inputs are not permitted (given: 'a'); did you mean `role`?",
        ),
        ({"task": "x", "n": 1}, "must be from 2 to 64"),
        ({"task": "x", "judge": "vote"}, "give `json_schema`"),
    ],
)
async def test_what_is_wrong_with_arguments_is_said(engine, given, says):
    async with connect(engine) as client:
        result = await client.call_tool("deliberate", given)
    assert result.is_error
    assert says in result.content[0].text
