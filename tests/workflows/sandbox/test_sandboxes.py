"""Sandboxes over a service of fakes: one token a character, and a model that repeats its prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator, Sequence
from contextlib import suppress
from typing import Any

import pytest

from mlx_mcp.core.session import SessionOptions
from mlx_mcp.errors import (
    CapacityError,
    GenerationFailed,
    RateLimited,
    SandboxBusy,
    SandboxFailed,
    UnknownSandbox,
)
from mlx_mcp.service.activity import Meter
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.limits import Limiter
from mlx_mcp.service.limits import Limits as LimitsOfPrincipal
from mlx_mcp.service.overview import overview
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.service.sessions import create_session
from mlx_mcp.workflows.asking import Budget
from mlx_mcp.workflows.sandbox.runtime import HostCall, Limits
from mlx_mcp.workflows.sandbox.sandbox import Program, Ran, Sandbox
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, closing, no_runtime
from tests.fakes import FakeRunner
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
    before, runner = sandbox.state, runner_of(service)
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


def waits(v: dict[str, Any], say: Any) -> Run:
    v["answer"] = yield HostCall("llm_query", ("go on",))


async def held(service: Service, begin: Coroutine[Any, Any, Ran]) -> asyncio.Task[Ran]:
    """A run that stands still in a question to the model, until the runner's gate is opened."""
    runner = runner_of(service)
    runner.steps.clear()
    runner.gate.clear()
    running = asyncio.create_task(begin)
    async with asyncio.timeout(30):
        while not runner.steps:
            await asyncio.sleep(0.001)
    return running


def runner_of(service: Service) -> FakeRunner:
    return service.engine.loader.runner  # type: ignore[attr-defined, no-any-return]


async def test_a_sandbox_that_is_closed_ends_its_run_and_all_that_it_remembers(service: Service) -> None:
    def remembers(v: dict[str, Any], say: Any) -> Run:
        yield HostCall("remember", ("Once.", "story"))

    runtime = FakeRuntime({"waits": waits, "remembers": remembers})
    sandboxes = Sandboxes(runtime.opened)
    sandbox = await sandboxes.create(service, CALLER)
    await run(sandboxes, service, sandbox, "remembers")
    assert len(known_sessions(service)) == 1
    running = await held(service, run(sandboxes, service, sandbox, "waits"))
    with pytest.raises(SandboxBusy, match="another program runs in"):
        await run(sandboxes, service, sandbox, "waits")
    [workflow] = overview(service, CALLER.tenant)["workflows"]
    assert (workflow["tool"], workflow["does"]) == ("sandbox_run", "0 of 1 answers, 1 running")
    assert workflow["name"] == f"{sandbox.sandbox_id[:8]}…"
    assert overview(service, "them")["workflows"][0]["name"] == ""
    await sandboxes.close(service, "them", [sandbox])
    assert sandbox.busy
    await sandboxes.close(service, CALLER.tenant, [sandbox])
    runner_of(service).gate.set()
    with pytest.raises(GenerationFailed, match="The sandbox was closed while its program ran"):
        await running
    assert (sandboxes.num, runtime.live, known_sessions(service)) == (0, [], {})
    assert overview(service)["workflows"] == []


async def test_of_two_runs_that_begin_while_the_runtime_is_opened_one_is_refused(service: Service) -> None:
    runtime, opened = FakeRuntime({"asks": asks}), asyncio.Event()

    async def opening() -> FakeRuntime:
        await opened.wait()
        return runtime

    sandboxes = Sandboxes(opening)
    sandbox, other = [await sandboxes.create(service, CALLER) for _ in range(2)]
    begun = [(sandbox, "Once"), (sandbox, "Twice"), (other, "Once")]
    runs = [asyncio.create_task(run(sandboxes, service, each, "asks", text=text)) for each, text in begun]
    await asyncio.sleep(0)
    await sandboxes.close(service, CALLER.tenant, [other])
    opened.set()
    came = await asyncio.gather(*runs, return_exceptions=True)
    assert [type(each) for each in came] == [Ran, SandboxBusy, UnknownSandbox]


async def test_an_owner_never_sees_anothers_sandbox(service: Service) -> None:
    sandboxes = Sandboxes(FakeRuntime().opened)
    sandbox = await sandboxes.create(service, CALLER, "mine")
    told = []
    for handle in (sandbox.sandbox_id, "mine", "x-none"):
        with pytest.raises(UnknownSandbox) as caught:
            sandboxes.get("them", handle)
        told.append(str(caught.value).replace(handle, "…"))
    assert len(set(told)) == 1
    assert sandboxes.infos("them") == []
    await sandboxes.create(service, Caller("them"), "mine")


async def test_only_so_many_workers_live_and_the_one_that_is_idle_for_longest_goes(service: Service) -> None:
    runtime = FakeRuntime({"asks": asks, "waits": waits})
    sandboxes = Sandboxes(runtime.opened, max_workers=2)
    first, second, third = [await sandboxes.create(service, CALLER) for _ in range(3)]
    for sandbox in (first, second, first, third):
        await run(sandboxes, service, sandbox, "asks", text="Once")
        assert sandboxes.num_workers == len(runtime.live) <= 2
    assert [each.worker is None for each in (first, second, third)] == [False, True, False]
    dump = second.state.dump
    running = await held(service, run(sandboxes, service, second, "waits"))
    assert runtime.live[-1].loaded == [dump]
    other = asyncio.create_task(run(sandboxes, service, third, "waits"))
    told: list[str] = []

    async def report(meters: Sequence[Meter]) -> None:
        told.append(meters[0].line)

    program = Program("waits")
    waiting = asyncio.create_task(sandboxes.run(service, CALLER, first, program, Limits(), Budget(), report))
    async with asyncio.timeout(30):
        while not told:
            await asyncio.sleep(0.001)
    assert told == ["waiting: 2 programs run already"]
    runner_of(service).gate.set()
    await asyncio.gather(running, other, waiting)
    assert len(runtime.live) == 2


async def test_an_idle_sandbox_gives_its_worker_up_and_ends_when_it_is_not_used(service: Service) -> None:
    now = 0.0
    runtime = FakeRuntime({"asks": asks})
    sandboxes = Sandboxes(runtime.opened, idle_s=0.01, ttl_s=100.0, clock=lambda: now)
    sandbox = await sandboxes.create(service, CALLER)
    await run(sandboxes, service, sandbox, "asks", text="Once")
    now = 5.0
    async with asyncio.timeout(30):
        while runtime.live:
            await asyncio.sleep(0.001)
    assert sandbox.state.variables
    await run(sandboxes, service, sandbox, "asks")
    now = 105.0
    await sandboxes.expire(service)
    assert sandboxes.num == 1
    now = 105.1
    await sandboxes.expire(service)
    assert sandboxes.num == 0


async def test_there_are_limits_of_sandboxes_of_their_memory_and_of_what_a_principal_has(service: Service) -> None:
    runtime = FakeRuntime({"asks": asks})
    sandboxes = Sandboxes(runtime.opened, max_sandboxes=2, max_state_bytes=10)
    sandbox = await sandboxes.create(service, CALLER)
    with pytest.raises(CapacityError, match="There are 1 sandboxes, and may be 2"):
        await sandboxes.fork(service, CALLER, sandbox.sandbox_id, 2, ())
    await run(sandboxes, service, sandbox, "asks", text="Once")
    with pytest.raises(CapacityError, match="The variables of all sandboxes take 0 MB, and may take 0 MB"):
        await run(sandboxes, service, sandbox, "asks")
    service = Service(service.engine, service.registry, limits=Limiter(lambda tenant: LimitsOfPrincipal(sessions=2)))
    sandboxes = Sandboxes(runtime.opened)
    sandbox = await sandboxes.create(service, CALLER)
    await create_session(service, CALLER, Context("S."), "", (), SessionOptions(), unheard)
    with pytest.raises(RateLimited, match="You have 2 sessions and sandboxes and may have 2"):
        await sandboxes.create(service, CALLER)
    await sandboxes.close(service, CALLER.tenant, [sandbox])
    await sandboxes.create(service, CALLER)


async def test_a_fork_that_cannot_have_what_its_parent_remembers_is_not_there(service: Service) -> None:
    def remembers(v: dict[str, Any], say: Any) -> Run:
        for key in "ab":
            yield HostCall("remember", (f"Text {key}.", key))

    runtime = FakeRuntime({"remembers": remembers})
    limited = Service(service.engine, service.registry, limits=Limiter(lambda tenant: LimitsOfPrincipal(sessions=7)))
    sandboxes = Sandboxes(runtime.opened)
    sandbox = await sandboxes.create(limited, CALLER)
    await run(sandboxes, limited, sandbox, "remembers")
    with pytest.raises(RateLimited):
        await sandboxes.fork(limited, CALLER, sandbox.sandbox_id, 2, ())  # 3 + 2, and 2 × 2 to remember
    assert sandboxes.num == 1
    assert len(known_sessions(service)) == 2
    [fork] = await sandboxes.fork(limited, CALLER, sandbox.sandbox_id, 1, ())
    assert not set(fork.state.remembered.values()) & set(sandbox.state.remembered.values())
    assert set(fork.state.remembered) == {"a", "b"}


async def test_what_is_remembered_anew_lets_go_of_what_was_before(service: Service) -> None:
    def remembers(v: dict[str, Any], say: Any) -> Run:
        yield HostCall("remember", (v["text"], "story"))
        v["answer"] = yield HostCall("llm_query", ("Who?",), {"over": "story"})

    runtime = FakeRuntime({"remembers": remembers})
    sandboxes = Sandboxes(runtime.opened)
    sandbox = await sandboxes.create(service, CALLER)
    for text in ("One.", "Two."):
        await run(sandboxes, service, sandbox, "remembers", text=text)
        assert runtime.workers[0].values["answer"] == f"{text}\n\nWho?"
        assert set(known_sessions(service)) == set(sandbox.state.remembered.values())


async def test_a_submitted_value_ends_a_program_that_catches_everything(service: Service) -> None:
    def submits(v: dict[str, Any], say: Any) -> Run:
        v["before"] = 1
        while True:
            try:
                yield HostCall("submit", (v["value"],))
            except BaseException:
                if "once" in v:
                    return "not this"
                v["once"] = True

    def never(v: dict[str, Any], say: Any) -> Run:
        while True:
            with suppress(Exception, SystemExit):  # not the end of the generator itself
                yield HostCall("llm_query", (1,))

    runtime = FakeRuntime({"submits": submits, "never": never})
    sandboxes = Sandboxes(runtime.opened)
    sandbox = await sandboxes.create(service, CALLER)
    ran = await run(sandboxes, service, sandbox, "submits", value=[1])
    assert (ran.ended.value, ran.ended.error, ran.ended.spoiled) == ([1], None, False)
    assert sandbox.state.variables["before"] == "int"
    before = sandbox.state
    ran = await run(sandboxes, service, sandbox, "never")
    assert ran.ended.error is not None
    assert "went on calling after 1000 calls had been refused" in ran.ended.error.message
    assert sandbox.state is before


async def test_a_run_with_other_limits_has_a_worker_with_these(service: Service) -> None:
    runtime = FakeRuntime({"asks": asks})
    sandboxes = Sandboxes(runtime.opened)
    sandbox = await sandboxes.create(service, CALLER)
    await run(sandboxes, service, sandbox, "asks", text="Once")
    small = Limits(1.0, 1 << 20)
    await sandboxes.run(service, CALLER, sandbox, Program("asks"), small, Budget(), unheard)
    assert [worker.limits for worker in runtime.workers] == [Limits(), small]
    assert runtime.workers[1].values["answer"] == "Once\n\nand?"
    assert len(runtime.live) == 1


async def test_the_end_of_the_process_ends_all_workers(service: Service) -> None:
    runtime = FakeRuntime({"asks": asks})
    sandboxes = Sandboxes(runtime.opened)
    async with closing(sandboxes):
        sandbox = await sandboxes.create(service, CALLER)
        await run(sandboxes, service, sandbox, "asks", text="Once")
        assert runtime.live
    assert runtime.closed
    assert not runtime.live
    async with closing(Sandboxes(no_runtime)) as nothing:
        assert nothing is None


async def test_where_nothing_runs_programs_that_is_said(service: Service) -> None:
    sandboxes = Sandboxes(no_runtime)
    sandbox = await sandboxes.create(service, CALLER)
    with pytest.raises(SandboxFailed, match="This server was built without sandboxes"):
        await run(sandboxes, service, sandbox, "asks")
    assert not sandbox.busy
