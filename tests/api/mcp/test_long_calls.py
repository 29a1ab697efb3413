"""Calls that go on after their answer: handles, results, parts, and tasks, in both protocol eras, over fakes."""

import asyncio
import json
import threading
from typing import Literal

import mcp_types as types
import pytest
from mcp import Client, MCPError
from mcp.client.extension import ClientExtension, ResultClaim
from pydantic import ConfigDict, Field

from mlx_mcp.api.mcp import calls, resources, tasks, waiting
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.jobs import Jobs
from mlx_mcp.service.service import Service
from tests.engine.test_client import until
from tests.fakes import FakeLoader, fake_client


@pytest.fixture(params=["auto", "legacy"])
def mode(request):
    return request.param


@pytest.fixture
async def engine():
    """An engine whose model is loaded, and computes nothing until its gate opens."""
    engine = fake_client(FakeLoader(context_tokens=3000))
    async with Client(build_server(Service(engine, Registry(None)))) as client:
        await call(client, "generate", prompt="warm", model="tiny")
    engine.loader.runner.gate.clear()
    yield engine
    engine.loader.runner.gate.set()
    engine.close()


@pytest.fixture
def service(engine):
    return Service(engine, Registry(None), Jobs())


def connect(service, mode="auto", wait_s=None, **options):
    return Client(build_server(service, wait_s=wait_s), mode=mode, **options)


async def call(client, tool, **arguments):
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return result.structured_content


async def refusal(client, tool, **arguments):
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.structured_content
    return result.content[0].text


async def begun(client, **arguments):
    """The handle of a call that runs."""
    answer = await call(client, "generate", **{"prompt": "hello", "model": "tiny", "wait_s": 0} | arguments)
    assert answer["status"] == "running"
    return answer["result_id"]


async def test_a_call_that_runs_on_is_answered_with_a_handle_that_fetches_its_result(service, mode):
    async with connect(service, mode) as client:
        answer = await client.call_tool("generate", {"prompt": "hello", "model": "tiny", "wait_s": 0.05})
        running = answer.structured_content
        assert (running["status"], running["tool"]) == ("running", "generate")
        assert (
            json.loads(answer.content[-1].text)["result_id"] == running["result_id"]
        )  # for hosts that show texts alone
        still = await call(client, "get_result", result_id=running["result_id"], wait_s=0)
        assert still["status"] == "running"
        service.engine.loader.runner.gate.set()
        done = await call(client, "get_result", result_id=running["result_id"])
        assert (done["text"], done["finish_reason"]) == ("hello", "stop")
        again = await call(client, "get_result", result_id=running["result_id"])
        assert again == done


async def test_what_there_is_of_an_answer_comes_with_the_handle(service):
    runner, steps = service.engine.loader.runner, threading.Semaphore(8)
    runner.endless, runner.gate.wait = True, lambda seconds: steps.acquire(timeout=seconds)
    async with connect(service) as client:
        result_id = await begun(client, max_tokens=1000)
        await until(lambda: any(meter.text for meter in service.jobs.get("", result_id).meters))
        running = await call(client, "get_result", result_id=result_id, wait_s=0)
        assert running["status"] == "running"
        assert running["text"].startswith("h")
        assert running["progress"].endswith(running["text"][-1])
        assert (await call(client, "cancel", result_id=result_id))["status"] == "cancelled"
        steps.release(100)


async def test_a_batch_that_runs_on_says_how_much_of_it_is_done(service):
    async with connect(service) as client:
        begun = await call(client, "generate_batch", prompts=["a", "b"], model="tiny", wait_s=0)
        await until(lambda: service.jobs.get("", begun["result_id"]).meters)
        running = await call(client, "get_result", result_id=begun["result_id"], wait_s=0)
        assert running["progress"].startswith("0 of 2 done")
        assert running["texts"] == ["", ""]
        service.engine.loader.runner.gate.set()
        done = await call(client, "get_result", result_id=begun["result_id"])
        assert [each["text"] for each in done["results"]] == ["a", "b"]


async def test_a_cancelled_job_frees_its_row_and_says_so_to_whoever_asks(service):
    async with connect(service) as client:
        result_id = await begun(client)
        assert (await call(client, "cancel", result_id=result_id)) == {"result_id": result_id, "status": "cancelled"}
        told = await refusal(client, "get_result", result_id=result_id)
        assert "leaves its session as it was; call again if it is needed" in told
        service.engine.loader.runner.gate.set()
        await until(lambda: service.engine.stats.rows == 0)
        assert (await call(client, "cancel", result_id=result_id))["status"] == "cancelled"  # again is no error


async def test_a_call_that_its_client_cancels_before_it_has_a_handle_is_ended(service):
    async with connect(service) as client:
        calling = asyncio.create_task(call(client, "generate", prompt="hello", model="tiny"))
        await until(lambda: service.jobs.busy)
        calling.cancel()
        await until(lambda: not service.jobs.busy)
        assert (await call(client, "get_result"))["results"] == []


async def test_a_handle_survives_its_window_and_is_everyones_who_shares_the_access(service, monkeypatch):
    async with connect(service) as client:
        result_id = await begun(client)
    service.engine.loader.runner.gate.set()
    async with connect(service) as client:
        [entry] = (await call(client, "get_result"))["results"]
        assert (entry["result_id"], entry["tool"]) == (result_id, "generate")
        assert (await call(client, "get_result", result_id=result_id))["text"] == "hello"
        assert (await call(client, "get_result"))["results"][0]["fetched"]
        monkeypatch.setattr(calls, "tenant", lambda: "another")
        foreign = await refusal(client, "get_result", result_id=result_id)
        missing = await refusal(client, "get_result", result_id="r-none")
        assert foreign.replace(result_id, "r-none") == missing
        assert "make the call again" in missing
        assert "Result not found" in await refusal(client, "cancel", result_id=result_id)
        assert (await call(client, "get_result"))["results"] == []


async def test_the_failure_of_a_call_is_told_to_whoever_fetches_it(service):
    async with connect(service) as client:
        result_id = await begun(client, session="nobody")
        assert "Session not found" in await refusal(client, "get_result", result_id=result_id)
        [entry] = (await call(client, "get_result"))["results"]
        assert entry["status"] == "failed"


async def test_a_call_that_is_answered_in_time_leaves_no_result(service):
    service.engine.loader.runner.gate.set()
    async with connect(service) as client:
        assert (await call(client, "generate", prompt="hello", model="tiny"))["text"] == "hello"
        assert (await call(client, "get_result"))["results"] == []


async def test_results_go_after_their_time_and_the_oldest_before_it_where_there_are_too_many(engine, monkeypatch):
    engine.loader.runner.gate.set()
    service = Service(engine, Registry(None), Jobs(ttl_s=0.05))
    async with connect(service) as client:
        result_id = await begun(client)
        await until(lambda: not service.jobs.of(""))
        assert "kept for 0 s" in await refusal(client, "get_result", result_id=result_id)
    monkeypatch.setattr("mlx_mcp.service.jobs.MAX_KEPT", 2)
    service = Service(engine, Registry(None), Jobs())
    async with connect(service) as client:
        ids = []
        for _ in range(4):  # one after the other, since the oldest is what ended first
            ids.append(await begun(client))
            await until(lambda: not service.jobs.busy)
        assert [each["result_id"] for each in (await call(client, "get_result"))["results"]] == ids[:1:-1]


@pytest.mark.parametrize(
    ("name", "setting", "expected"),
    [
        ("claude-code", None, 110),
        ("gemini-cli-mcp-client", None, 540),
        ("someone", None, 50),
        ("claude-code", 7.0, 7.0),
    ],
)
async def test_a_window_waits_for_as_long_as_it_is_set_or_its_host_allows(service, mode, name, setting, expected):
    seen = []

    class Spy(calls.ToolSet):
        async def tool(self, ctx):
            seen.append(waiting.wait_s(ctx, None, self._wait_s))

    server = build_server(service, wait_s=setting)
    spy = Spy(service, wait_s=setting)

    @server.tool()
    async def look(ctx: calls.ToolContext) -> str:
        await spy.tool(ctx)
        return ""

    async with Client(server, mode=mode, client_info=types.Implementation(name=name, version="1")) as client:
        await client.call_tool("look", {})
    assert seen == [expected]


async def test_a_result_that_is_too_long_comes_in_parts_with_a_link_to_the_whole(service, mode, monkeypatch):
    service.engine.loader.runner.gate.set()
    monkeypatch.setattr(waiting, "MAX_CHARS", 300)
    prompt = "".join(map(str, range(300)))
    async with connect(service, mode) as client:
        first = await client.call_tool("generate", {"prompt": prompt, "model": "tiny", "max_tokens": len(prompt)})
        part = first.structured_content
        assert (part["status"], part["total_chars"]) == ("part", len(prompt))
        [link] = [block for block in first.content if block.type == "resource_link"]
        assert link.uri == part["uri"] == f"mlx://results/{part['result_id']}"
        text, offset = part["text"], part["next_offset"]
        while offset is not None:
            more = await call(client, "get_result", result_id=part["result_id"], offset=offset)
            text, offset = text + more["text"], more.get("next_offset")
        assert text == prompt
        whole = json.loads((await client.read_resource(part["uri"])).contents[0].text)
        assert (whole["text"], whole["finish_reason"]) == (prompt, "length")


async def test_the_resource_of_a_result_is_its_owners_and_there_when_it_has_ended(service, mode, monkeypatch):
    async with connect(service, mode) as client:
        uri = f"mlx://results/{await begun(client)}"
        with pytest.raises(MCPError, match="get_result waits for it"):
            await client.read_resource(uri)
        service.engine.loader.runner.gate.set()
        await until(lambda: not service.jobs.busy)
        assert json.loads((await client.read_resource(uri)).contents[0].text)["text"] == "hello"
        monkeypatch.setattr(resources, "tenant", lambda: "another")
        with pytest.raises(MCPError, match="Result not found"):
            await client.read_resource(uri)


# Tasks


class Task(types.Result):
    """A task in place of a result."""

    result_type: Literal["task"] = "task"
    task_id: str = Field(alias="taskId")
    status: str
    poll_interval_ms: int = Field(alias="pollIntervalMs")


class TakesTasks(ClientExtension):
    """Announces that a client takes tasks, and polls for their results."""

    identifier = waiting.TASKS

    def claims(self):
        return [ResultClaim(result_type="task", model=Task, resolve=self.resolve)]

    async def resolve(self, task, ctx):
        while True:
            told = await ask(ctx.session, "tasks/get", taskId=task.task_id)
            if told["status"] != "working":
                return types.CallToolResult.model_validate(told["result"])
            await asyncio.sleep(0.01)


class Anything(types.Result):
    """What an answer of the extension has."""

    model_config = ConfigDict(extra="allow")


async def ask(session, method, **params):
    """A request of the extension, as a client of it sends it."""
    request = types.Request[dict, str](method=method, params=params)
    return (await session.send_request(request, Anything)).model_dump(by_alias=True)


async def a_task(client, **arguments):
    arguments = {"prompt": "hello", "model": "tiny", "wait_s": 0} | arguments
    result = await client.session.call_tool("generate", arguments, allow_claimed=True)
    assert isinstance(result, Task)
    return result.task_id


async def test_a_client_that_takes_tasks_gets_one_and_its_result_is_the_calls(service):
    async with connect(service, extensions=[TakesTasks()]) as client:
        task_id = await a_task(client)
        told = await ask(client.session, "tasks/get", taskId=task_id)
        assert (told["status"], told["resultType"], told["ttlMs"]) == ("working", "complete", None)
        assert told["statusMessage"]
        service.engine.loader.runner.gate.set()
        await until(lambda: not service.jobs.busy)
        told = await ask(client.session, "tasks/get", taskId=task_id)
        assert (told["status"], told["result"]["structuredContent"]["text"]) == ("completed", "hello")
        assert told["ttlMs"] >= 3_600_000
        assert (await call(client, "get_result", result_id=task_id))["text"] == "hello"  # one job under both names


async def test_a_client_that_follows_tasks_sees_an_ordinary_result(service):
    async with connect(service, extensions=[TakesTasks()]) as client:
        calling = asyncio.create_task(client.call_tool("generate", {"prompt": "hello", "model": "tiny", "wait_s": 0}))
        await until(lambda: service.jobs.of(""))
        service.engine.loader.runner.gate.set()
        assert (await calling).structured_content["text"] == "hello"


async def test_a_task_is_cancelled_by_its_client(service):
    async with connect(service, extensions=[TakesTasks()]) as client:
        task_id = await a_task(client)
        await ask(client.session, "tasks/cancel", taskId=task_id)
        await until(lambda: not service.jobs.busy)
        told = await ask(client.session, "tasks/get", taskId=task_id)
        assert told["status"] == "cancelled"
        assert "result" not in told
        assert (await ask(client.session, "tasks/update", taskId=task_id, inputResponses={}))[
            "resultType"
        ] == "complete"


async def test_a_tools_error_completes_its_task(service):
    async with connect(service, extensions=[TakesTasks()]) as client:
        task_id = await a_task(client, session="nobody")
        await until(lambda: not service.jobs.busy)
        told = await ask(client.session, "tasks/get", taskId=task_id)
        assert (told["status"], told["result"]["isError"]) == ("completed", True)
        assert "Session not found" in told["result"]["content"][0]["text"]


async def test_unknown_tasks_and_clients_that_take_none_are_refused(service, monkeypatch):
    async with connect(service, extensions=[TakesTasks()]) as client:
        task_id = await a_task(client)
        monkeypatch.setattr(tasks, "tenant", lambda: "another")
        for method in ("tasks/get", "tasks/update", "tasks/cancel"):
            with pytest.raises(MCPError, match="Result not found") as refused:
                await ask(client.session, method, taskId=task_id)
            assert refused.value.error.code == types.INVALID_PARAMS
    async with connect(service) as client:
        assert (await call(client, "generate", prompt="x", model="tiny", wait_s=0))["status"] == "running"
        with pytest.raises(MCPError, match="did not declare") as refused:
            await ask(client.session, "tasks/get", taskId=task_id)
        assert refused.value.error.code == -32021


async def test_the_older_era_has_no_tasks(service):
    async with connect(service, "legacy", extensions=[TakesTasks()]) as client:
        assert (await call(client, "generate", prompt="x", model="tiny", wait_s=0))["status"] == "running"
