"""Programs in sandboxes as an MCP client sees them, over a scripted interpreter and a model that repeats its prompt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.opening import open_runtime
from mlx_mcp.workflows.sandbox.runtime import HostCall
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, closing
from tests.fakes import FakeLoader, fake_client
from tests.workflows.fakes import FakeRuntime, Spoil

Run = Generator[HostCall, Any, Any]


def labels(v: dict[str, Any], say: Any) -> Run:
    """The story of the guide: one question for each text."""
    v["table"] = yield HostCall("llm_map", ("Label:", sorted(v["files"].values())))
    say(f"{len(v['table'])} labels")


def submits(v: dict[str, Any], say: Any) -> Run:
    yield HostCall("submit", ({"n": len(v)},))


def large(v: dict[str, Any], say: Any) -> Run:
    say("a" * 400 + "b" * 400)
    return ["v" * 900]
    yield


def fails(v: dict[str, Any], say: Any) -> Run:
    say("before")
    v["kept"] = 1
    raise KeyError("nothing")
    yield


def spoils(v: dict[str, Any], say: Any) -> Run:
    v["gone"] = 1
    raise Spoil("the time limit of 10 s was reached")
    yield


def half(v: dict[str, Any], say: Any) -> Run:
    v["answers"] = yield HostCall("llm_query_batched", (["a", "b" * 3000, "c"],))


def singles(v: dict[str, Any], say: Any) -> Run:
    for each in "abcd":
        yield HostCall("llm_query", (each,))


def remembers(v: dict[str, Any], say: Any) -> Run:
    key = yield HostCall("remember", ("A long text.", "text"))
    say((yield HostCall("llm_query", ("Who?",), {"over": key})))


PROGRAMS = {each.__name__: each for each in (labels, submits, large, fails, spoils, half, singles, remembers)}


@pytest.fixture
def engine() -> Generator[EngineClient]:
    engine = fake_client(FakeLoader(context_tokens=2000), block_tokens=16)
    yield engine
    assert engine.close()


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime(dict(PROGRAMS))


def connect(engine: EngineClient, runtime: FakeRuntime, folder: Path | None = None, **more: Any) -> Client:
    files = FileReader((folder,), 1000, 1000) if folder else None
    service = Service(engine, Registry(None))
    return Client(build_server(service, files, sandboxes=Sandboxes(runtime.opened, **more)))


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content[0]
    return dict(result.structured_content or {})


async def run(client: Client, code: str = "", **arguments: Any) -> dict[str, Any]:
    return await call(client, "sandbox_run", code=code, **arguments)


async def refusal(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.structured_content
    return str(result.content[0].text)  # type: ignore[union-attr]


async def test_a_program_reads_files_and_only_what_it_prints_comes_back(
    engine: EngineClient, runtime: FakeRuntime, tmp_path: Path
) -> None:
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(f"canary {index}")
    async with connect(engine, runtime, tmp_path) as client:
        ran = await run(client, "labels", files=["*.txt"], name="mail")
        assert ran["output"] == "3 labels\n"
        assert (ran["name"], ran["isolation"], ran["variables"]) == (
            "mail",
            runtime.isolation,
            {"files": "dict", "table": "list"},
        )
        assert runtime.workers[0].values["table"] == [f"Label:\n\ncanary {index}" for index in range(3)]
        assert ran["calls"]["calls"] == 3
        assert ran["calls"]["cached_tokens"] + ran["calls"]["computed_tokens"] == ran["calls"]["prompt_tokens"] == 48
        assert "canary" not in json.dumps(ran)
        again = await run(client, "submits", sandbox="mail")
        assert (again["value"], again["sandbox"]) == ({"n": 2}, ran["sandbox"])


async def test_without_code_a_sandbox_is_made_filled_and_described(
    engine: EngineClient, runtime: FakeRuntime, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("canary")
    runtime.programs["None"] = lambda v, say: iter(())  # type: ignore[assignment, return-value]
    async with connect(engine, runtime, tmp_path) as client:
        made = await run(client)
        assert made["sandbox"].startswith("x-")
        assert "llm_ask(text, questions, schema=None" in "".join(made["functions"])
        filled = await run(client, sandbox=made["sandbox"], files=["a.txt"])
        assert filled["variables"] == {"files": "dict", "context": "str"}
        assert runtime.workers[0].values["context"] == "canary"
        assert (await run(client, sandbox=made["sandbox"]))["variables"] == filled["variables"]


async def test_output_and_values_that_are_too_long_are_cut_and_it_is_said_how(
    engine: EngineClient, runtime: FakeRuntime
) -> None:
    async with connect(engine, runtime) as client:
        ran = await run(client, "large", output_chars=200)
        assert ran["output"] == (
            "a" * 140 + "\n[601 of 801 characters are left out: print less, or give output_chars]\n" + "b" * 59 + "\n"
        )
        assert "value" not in ran
        assert "The value has 904 characters of JSON and was left out: keep it in a variable" in ran["note"]
        assert (await run(client, "large"))["value"] == ["v" * 900]


async def test_an_exception_is_told_with_its_line_and_the_variables_stay(
    engine: EngineClient, runtime: FakeRuntime
) -> None:
    async with connect(engine, runtime) as client:
        ran = await run(client, "fails")
        assert ran["error"] == {"type": "KeyError", "message": "'nothing'", "line": 1}
        assert (ran["output"], ran["variables"]) == ("before\n", {"kept": "int"})
        spoiled = await run(client, "spoils", sandbox=ran["sandbox"])
        assert spoiled["error"]["message"] == "the time limit of 10 s was reached"
        assert spoiled["note"] == "The variables are as they were before this run."
        assert spoiled["variables"] == {"kept": "int"}
        wrong = await run(client, "what?", sandbox=ran["sandbox"])
        assert wrong["error"] == {
            "type": "SyntaxError",
            "message": "no program 'what?'",
            "line": 1,
            "hint": "Write another.",
        }


async def test_a_question_without_an_answer_is_none_and_is_told(engine: EngineClient, runtime: FakeRuntime) -> None:
    async with connect(engine, runtime) as client:
        ran = await run(client, "half")
        assert runtime.workers[0].values["answers"] == ["a", None, "c"]
        assert ran["failed"]["count"] == ran["calls"]["failed"] == 1
        [first] = ran["failed"]["first"]
        assert first["index"] == 1
        assert "The prompt has 3000 tokens" in first["error"]


async def test_single_questions_in_a_row_earn_a_hint(engine: EngineClient, runtime: FakeRuntime) -> None:
    async with connect(engine, runtime) as client:
        note = (await run(client, "singles"))["note"]
        assert "The program asked 4 questions one after the other. llm_query_batched(prompts)" in note


async def test_sandboxes_are_forked_listed_and_closed_as_sessions_are(
    engine: EngineClient, runtime: FakeRuntime
) -> None:
    async with connect(engine, runtime) as client:
        ran = await run(client, "remembers", name="texts")
        assert ran["remembered"] == ["text"]
        made = await call(client, "fork_session", session="texts", names=["one", "two"])
        assert made["names"] == ["one", "two"]
        assert [handle.startswith("x-") for handle in made["sessions"]] == [True, True]
        listed = await call(client, "list_sessions")
        assert {each["name"] for each in listed["sandboxes"]} == {"texts", "one", "two"}
        assert [each["parent"] for each in listed["sandboxes"] if each["name"] == "one"] == [ran["sandbox"]]
        assert len(listed["sessions"]) == 3  # of what each remembers
        assert (await run(client, "remembers", sandbox="one"))["remembered"] == ["text"]
        closed = await call(client, "close_session", sessions=["one", made["sessions"][1]])
        assert closed["closed"] == made["sessions"]
        assert len((await call(client, "list_sessions"))["sessions"]) == 1
        await call(client, "create_session", system="S.", name="other")
        assert "There is a sandbox or session named 'other'" in await refusal(client, "sandbox_run", name="other")
        assert len((await call(client, "close_session", all=True))["closed"]) == 3
        assert (await call(client, "list_sessions")) == {"sessions": []}


async def test_what_is_not_there_or_cannot_be_is_refused_with_the_next_step(
    engine: EngineClient, runtime: FakeRuntime, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a")
    async with connect(engine, runtime, tmp_path) as client:
        await run(client, name="mail")
        for tool in ("sandbox_run", "fork_session"):
            name = "sandbox" if tool == "sandbox_run" else "session"
            told = await refusal(client, tool, **{name: "x-none"})
            assert "Sandbox not found: 'x-none'. It was closed" in told
        assert "Did you mean 'mail'?" in await refusal(client, "sandbox_run", sandbox="mails")
        assert "Sandbox not found: 'x-1'" in await refusal(client, "close_session", sessions=["mail", "x-1"])
        assert "Session not found" in await refusal(client, "close_session", sessions=["mail", "nobody"])
        assert [each["name"] for each in (await call(client, "list_sessions"))["sandboxes"]] == ["mail"]
        assert "'mail' has no version 'v' on disk" in await refusal(client, "fork_session", session="mail", version="v")
        assert "There are 1 names for 2 forks" in await refusal(
            client, "fork_session", session="mail", count=2, names=["a"]
        )
        for name in ("x-mail", "s_mail", "a b"):
            assert "cannot be a sandbox's name" in await refusal(client, "sandbox_run", name=name)
        assert "since handles begin with s_ or x-" in await refusal(client, "create_session", system="S", name="x-1")
        assert "`name` is for a new sandbox" in await refusal(client, "sandbox_run", sandbox="mail", name="other")
        both = await refusal(client, "sandbox_run", files=["a.txt"], context="b")
        assert "A single file is `context` already" in both
        assert "Model not found: 'none'" in await refusal(client, "sandbox_run", model="none")
        assert "No file matches 'b*'" in await refusal(client, "sandbox_run", files=["b*"])
        assert len((await call(client, "list_sessions"))["sandboxes"]) == 1


async def test_a_run_that_takes_long_tells_how_many_answers_there_are_and_can_be_cancelled(
    engine: EngineClient, runtime: FakeRuntime, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("canary")
    async with connect(engine, runtime, tmp_path) as client:
        made = await run(client, "remembers")
        runner = engine.loader.runner  # type: ignore[attr-defined]
        runner.endless = True
        running = await run(client, "half", sandbox=made["sandbox"], wait_s=0)
        async with asyncio.timeout(30):
            while running["progress"] != "1 of 3 answers, 2 running":
                running = await call(client, "get_result", result_id=running["result_id"], wait_s=0)
        assert "text" not in running
        assert "sandbox_busy" in await refusal(client, "sandbox_run", code="half", sandbox=made["sandbox"])
        await call(client, "cancel", result_id=running["result_id"])
        async with asyncio.timeout(30):
            while engine.stats.running or engine.stats.waiting:
                await asyncio.sleep(0.001)
        listed = await call(client, "list_sessions")
        assert [each["busy"] for each in listed["sandboxes"]] == [False]
        assert (await run(client, sandbox=made["sandbox"]))["remembered"] == ["text"]


CAUGHT = """
try:
    answers = llm_query_batched(["a", "b", "c"])
except RuntimeError as error:
    print(error)
after = 1
"""


@pytest.mark.parametrize(
    ("code", "options", "told"),
    [
        ("x = 1\nwhile True: pass", {"python_s": 0.2}, "TimeoutError: the program ran for more than 0.2 s"),
        ("x = 1\ny = ['a' * 1000 for _ in range(100_000)]", {"memory_mb": 16}, "MemoryError"),
        (CAUGHT, {"max_calls": 2}, "These are 3 calls, and this run may make 2 more (of 2). Ask fewer"),
        (CAUGHT, {"max_tokens_in_all": 0}, "had 0 tokens computed and written, and may have 0. Ask fewer or shorter"),
        (CAUGHT, {"timeout_s": 1e-9}, "This run has used the 1e-09 s that it may take. Ask fewer, or run again"),
        ("for i in range(30): print('a' * 100_000)", {"output_chars": 100}, "characters are left out: print less"),
    ],
)
async def test_each_budget_of_a_run_ends_it_and_is_named(
    engine: EngineClient, tmp_path: Path, code: str, options: dict[str, Any], told: str
) -> None:
    service, sandboxes = Service(engine, Registry(None)), Sandboxes(partial(open_runtime, tmp_path))
    async with closing(sandboxes), Client(build_server(service, sandboxes=sandboxes)) as client:
        made = await run(client, "before = 1")
        ran = await run(client, code, sandbox=made["sandbox"], options=options)
        error = ran.get("error", {"type": "", "message": ""})
        assert told in f"{error['type']}: {error['message']}\n{ran.get('output')}"
        rolled_back = "The variables are as they were before this run." in ran.get("note", "")
        assert rolled_back is bool({"python_s", "memory_mb"} & options.keys())
        assert ("after" in ran["variables"]) is (code is CAUGHT)
        assert "x" not in ran["variables"]
        assert len(ran.get("output") or "") < 1000
        assert (await run(client, "before + 1", sandbox=made["sandbox"]))["value"] == 2
