"""Sandboxes over a service of fakes: one token a character, and a model that repeats its prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest

from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.workflows.asking import Budget
from mlx_mcp.workflows.sandbox.runtime import HostCall, Limits
from mlx_mcp.workflows.sandbox.sandbox import Program, Ran, Sandbox
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes
from tests.service.house import CALLER, make_service, unheard
from tests.workflows.fakes import FakeRuntime, Spoil

Run = Generator[HostCall, Any, Any]


@pytest.fixture
def service() -> Generator[Service]:
    service = make_service()
    yield service
    assert service.engine.close()


async def run(sandboxes: Sandboxes, service: Service, sandbox: Sandbox, code: str, **inputs: Any) -> Ran:
    return await sandboxes.run(service, CALLER, sandbox, Program(code, inputs), Limits(), Budget(), unheard)


def asks(v: dict[str, Any], say: Any) -> Run:
    v["answer"] = yield HostCall("llm_query", (), {"prompt": "and?", "text": v["text"]})
    say(v["answer"])
    return len(v["answer"])


async def test_a_program_asks_the_model_and_its_variables_stay(service: Service) -> None:
    runtime = FakeRuntime({"asks": asks})
    sandboxes = Sandboxes(runtime.opened)
    sandbox = await sandboxes.create(service, CALLER)
    ran = await run(sandboxes, service, sandbox, "asks", text="Once")
    assert (ran.output, ran.ended.value) == ("Once\n\nand?\n", 10)
    assert (ran.counts.calls, ran.counts.computed_tokens) == (1, 10)
    assert sandbox.state.variables == {"text": "str", "answer": "str"}
    assert runtime.workers[0].values["answer"] == "Once\n\nand?"


async def test_a_run_that_breaks_a_limit_leaves_the_state_as_it_was(service: Service) -> None:
    def spoils(v: dict[str, Any], say: Any) -> Run:
        v["answer"] = yield HostCall("remember", ("text",))
        raise Spoil("too long")

    runtime = FakeRuntime({"asks": asks, "spoils": spoils})
    sandboxes = Sandboxes(runtime.opened)
    sandbox = await sandboxes.create(service, CALLER)
    await run(sandboxes, service, sandbox, "asks", text="Once")
    before = sandbox.state
    ran = await run(sandboxes, service, sandbox, "spoils", more="x")
    assert ran.ended.spoiled
    assert sandbox.state is before
    assert not known_sessions(service)
    await run(sandboxes, service, sandbox, "asks")
    assert [worker.closed for worker in runtime.workers] == [True, False]
    assert runtime.workers[1].loaded == [before.dump]


async def test_a_cancelled_run_leaves_the_state_as_it_was_and_no_row(service: Service) -> None:
    runtime = FakeRuntime({"asks": asks})
    sandboxes = Sandboxes(runtime.opened)
    sandbox = await sandboxes.create(service, CALLER)
    await run(sandboxes, service, sandbox, "asks", text="Once")
    before, runner = sandbox.state, service.engine.loader.runner  # type: ignore[attr-defined]
    runner.endless = True
    runner.steps.clear()
    running = asyncio.create_task(run(sandboxes, service, sandbox, "asks", text="Twice"))
    async with asyncio.timeout(30):
        while not runner.steps:
            await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        while service.engine.stats.running:
            await asyncio.sleep(0.001)
    assert sandbox.state is before
    assert not sandbox.busy
    assert runtime.live == []
