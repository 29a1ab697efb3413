"""The tool `reason_over` as an in-memory MCP client sees it, over a scripted interpreter and a scripted model."""

import json

import pytest
from mcp import Client

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.runtime import HostCall
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes
from tests.engine.test_client import until
from tests.fakes import FakeLoader, fake_client
from tests.workflows.fakes import FakeRuntime

CANARY = "canary-71"


def nothing(v, say):
    return None
    yield


def counts(v, say):
    say(CANARY)
    v["n"] = len(v["files"]) if "files" in v else len(v["context"])
    yield HostCall("submit", (v["n"],))


PROGRAMS = {"None": nothing, "count\n": counts}


@pytest.fixture
def engine():
    loader = FakeLoader(context_tokens=20_000)
    loader.runner.says = lambda text: "I count.\n```python\ncount\n```" if "Begin. Reply" in text else text
    engine = fake_client(loader)
    yield engine
    assert engine.close()


@pytest.fixture
def sandboxes():
    async def open_runtime():
        return FakeRuntime(PROGRAMS)

    return Sandboxes(open_runtime)


def connect(engine, sandboxes, folder=None):
    files = FileReader((folder,), 10_000, 10_000) if folder else None
    return Client(build_server(Service(engine, Registry(None)), files, sandboxes=sandboxes))


async def test_files_are_read_here_and_the_answer_alone_comes_back(engine, sandboxes, tmp_path):
    for name in ("a.log", "b.log"):
        (tmp_path / name).write_text(CANARY)
    async with connect(engine, sandboxes, tmp_path) as client:
        asked = {
            "question": "How many files?",
            "files": ["*.log"],
            "strategy": "free",
            "json_schema": {"type": "integer"},
        }
        result = await client.call_tool("reason_over", asked)
    made = result.structured_content
    assert (made["answer"], made["stopped"], made["strategy"]) == (2, "submitted", "free")
    assert made["programs"] == [{"calls": 0, "printed_chars": len(CANARY) + 1}]
    assert made["calls"]["calls"] == 2
    assert made["isolation"] == "none: a fake"
    assert "sandbox" not in made
    assert CANARY not in json.dumps(result.model_dump(mode="json"))
    assert sandboxes.num == 0


async def test_a_sandbox_stays_as_it_is_and_its_fork_can_be_kept(engine, sandboxes):
    async with connect(engine, sandboxes) as client:

        async def call(tool, **arguments):
            return (await client.call_tool(tool, arguments)).structured_content

        box = (await call("sandbox_run", context="abc", name="box"))["sandbox"]
        made = await call("reason_over", question="How long?", sandbox="box", strategy="free", keep=True)
        assert made["answer"] == 3
        there = {each["sandbox"]: each for each in (await call("list_sessions"))["sandboxes"]}
    assert there.keys() == {box, made["sandbox"]}
    assert there[made["sandbox"]]["parent"] == box
    assert (there[box]["variables"], there[made["sandbox"]]["variables"]) == (1, 2)


async def test_what_was_said_in_a_session_can_be_the_input(engine, sandboxes):
    async with connect(engine, sandboxes) as client:

        async def call(tool, **arguments):
            return (await client.call_tool(tool, arguments)).structured_content

        session = (await call("create_session", system="Ann owes Bob."))["session"]
        made = await call("reason_over", question="How long?", session=session, strategy="free")
    assert made["answer"] == len("text:\nAnn owes Bob.")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "Give one of `files`, `sandbox` and `session`"),
        ({"sandbox": "a", "session": "b"}, "Give one of `files`, `sandbox` and `session`"),
        ({"sandbox": "x-none"}, "Sandbox not found"),
        ({"session": "none"}, "Session not found"),
        ({"question": " ", "session": "none"}, "`question` is empty"),
        ({"depth": 3, "session": "none"}, "less than or equal to 2"),
    ],
)
async def test_what_is_wrong_with_a_call_is_said(engine, sandboxes, given, says):
    async with connect(engine, sandboxes) as client:
        result = await client.call_tool("reason_over", {"question": "Q?", "strategy": "free"} | given)
    assert result.is_error
    assert says in result.content[0].text
    assert sandboxes.num == 0


async def test_a_run_that_goes_on_is_followed_and_cancelled_and_leaves_nothing(engine, sandboxes):
    engine.loader.runner.endless = True
    async with connect(engine, sandboxes) as client:

        async def call(tool, **arguments):
            return (await client.call_tool(tool, arguments)).structured_content

        await call("sandbox_run", context="abc", name="box")
        began = await call("reason_over", question="Q?", sandbox="box", strategy="free", wait_s=0)
        await until(lambda: engine.stats.output_tokens > 20)
        on = await call("get_result", result_id=began["result_id"], wait_s=0)
        assert on["progress"].startswith("program 1 of 20: the model writes its program")
        assert (await call("cancel", result_id=began["result_id"]))["status"] == "cancelled"
        await until(lambda: engine.stats.rows == 0)
        held = await call("list_sessions")
    assert held["sessions"] == []
    assert [each["name"] for each in held["sandboxes"]] == ["box"]
