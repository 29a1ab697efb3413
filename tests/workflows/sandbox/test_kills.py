"""The worker killed, the engine killed, and the run cancelled, at every suspension of drawn programs.

Whatever ended, the state is that of the latest run that ended by itself, no row goes on, and a replay asks nobody.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Awaitable, Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlx_mcp.workflows.sandbox.journal import replay
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits, ProgramError, Worker
from mlx_mcp.workflows.sandbox.sandbox import Sandbox, State
from tests.effort import drawn, seconds
from tests.fakes import FakeStore
from tests.service.house import CALLER
from tests.storage.world import scratch
from tests.workflows.fakes import FakeRuntime, FakeWorker, Program
from tests.workflows.sandbox.processes import Process, process

Hook = Callable[[int], Awaitable[bool]]  # takes the number of a suspension from 1 on, and says whether the worker dies

NUM_RUNS = 3
NUM_TRACES = drawn(60)
DEAD = Ended(error=ProgramError("RuntimeError", "the worker ended", None, ""), spoiled=True)


def drawn_program(rng: random.Random) -> Program:
    """A program of a few host calls, some of which are refused, and which may end with an exception."""
    calls = [
        rng.choice(["llm_query", "llm_query_batched", "remember", "over", "wrong"]) for _ in range(rng.randrange(4))
    ]
    ending = rng.choice(["end", "end", "raise", "submit"])

    def program(v: dict[str, Any], say: Any) -> Generator[HostCall, Any, Any]:
        for number, kind in enumerate(calls):
            v["n"] = v.get("n", 0) + 1
            asked = {
                "llm_query": HostCall("llm_query", (f"{v['n']}?",)),
                "llm_query_batched": HostCall("llm_query_batched", ([f"{v['n']} {each}" for each in "ab"],)),
                "remember": HostCall("remember", (f"text {v['n']}",), {"name": "it"}),
                "over": HostCall("llm_query", ("and?",), {"over": "it"}),
                "wrong": HostCall("llm_map", (number,)),
            }[kind]
            try:
                v[kind] = yield asked
            except (TypeError, ValueError) as error:
                v[kind] = type(error).__name__
            say(kind)
        if ending == "submit":
            yield HostCall("submit", (v.get("n"),))
        if ending == "raise":
            raise KeyError("drawn")
        return v.get("n")

    return program


@dataclass
class Watched(FakeRuntime):
    """Counts the suspensions of its workers, and has a hook called at each."""

    hook: Hook | None = None
    num: int = 0

    async def start(self, limits: Limits, functions: Collection[str]) -> Worker:
        self.workers.append(WatchedWorker(self, limits, functions))
        return self.workers[-1]

    async def suspended(self) -> bool:
        self.num += 1
        return self.hook is not None and await self.hook(self.num)


@dataclass
class WatchedWorker(FakeWorker):
    """Dies at a suspension if the hook says so."""

    dead: bool = False

    async def run(self, code: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
        return await self._watched(await super().run(code, inputs, moment))

    async def answer(self, value: Any) -> HostCall | Ended:
        return DEAD if self.dead else await self._watched(await super().answer(value))

    async def refuse(self, type: str, message: str) -> HostCall | Ended:
        return DEAD if self.dead else await self._watched(await super().refuse(type, message))

    async def _watched(self, step: HostCall | Ended) -> HostCall | Ended:
        if isinstance(step, HostCall):
            assert isinstance(self.runtime, Watched)
            self.dead = await self.runtime.suspended()
        return step


@dataclass
class Trace:
    """Some programs, one run after the other in one sandbox."""

    seed: int
    programs: dict[str, Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.programs = {f"run {number}": drawn_program(rng) for number in range(NUM_RUNS)}

    def runtime(self, **changes: Any) -> Watched:
        return Watched(dict(self.programs), **changes)

    async def begin(self, server: Process) -> Sandbox:
        """The sandbox before the last run."""
        sandbox = await server.sandboxes.create(server.service, CALLER, "it")
        for code in list(self.programs)[:-1]:
            await server.run(sandbox, code, given=code)
        return sandbox

    async def end(self, server: Process, sandbox: Sandbox) -> Any:
        """The last run, and what it gives."""
        *_, code = self.programs
        ran = await server.run(sandbox, code, given=code)
        return ran.output, ran.ended


def told(state: State) -> tuple[Any, ...]:
    """What of a state must come back: all but the handles of sessions, which each process makes anew."""
    return state.dump, state.version, dict(state.variables), sorted(state.remembered)


async def idle(server: Process) -> None:
    """No row goes on, and nothing waits."""
    async with asyncio.timeout(30):
        while server.service.engine.stats.running or server.service.engine.stats.waiting:
            await asyncio.sleep(0.001)


@pytest.mark.timeout(seconds(300))
async def test_a_kill_of_the_engine_at_any_suspension_leaves_the_latest_run_and_its_replay_asks_nobody() -> None:
    for seed in range(NUM_TRACES):
        with scratch() as folder:
            await check_engine_kills(Trace(seed), folder)


async def check_engine_kills(trace: Trace, folder: Path) -> None:
    snapshots: list[tuple[Path, State | None]] = []
    runtime, store = trace.runtime(), FakeStore()
    async with process(runtime, folder / "kept", store) as first:

        async def copy(number: int) -> bool:
            """What a SIGKILL at this moment leaves: all that was written, whoever wrote it."""
            if (folder / "kept").exists():
                snapshots.append((folder / f"after-{len(snapshots)}", first.sandboxes.all()[0].state))
                shutil.copytree(folder / "kept", snapshots[-1][0])
            return False

        runtime.hook = copy
        sandbox = await trace.begin(first)
        await trace.end(first, sandbox)
        await copy(0)
    for number, (path, state) in enumerate(snapshots):
        assert state is not None
        async with process(trace.runtime(version="fake 2"), path) as second:
            again = await second.found("it")
            found = await second.sandboxes.keeping.state_of(again)
            assert (told(found), found.journal) == (told(state), state.journal), f"seed {trace.seed}, kill {number}"
            worker = FakeWorker(trace.runtime(), Limits(), ())
            await replay(found.journal, worker)
            assert await worker.dump() == state.dump, f"seed {trace.seed}, kill {number}"
            assert second.num_asked == 0
    assert snapshots or not runtime.num


@pytest.mark.timeout(seconds(300))
async def test_a_kill_of_the_worker_at_any_suspension_leaves_the_state_before_and_the_run_can_be_repeated() -> None:
    for seed in range(NUM_TRACES):
        await check_ends(Trace(seed), cancelled=False)


@pytest.mark.timeout(seconds(300))
async def test_a_cancel_at_any_suspension_leaves_the_state_before_and_no_row() -> None:
    for seed in range(NUM_TRACES):
        await check_ends(Trace(seed), cancelled=True)


async def check_ends(trace: Trace, cancelled: bool) -> None:
    with scratch() as folder:
        runtime = trace.runtime()
        async with process(runtime, folder / "kept") as server:
            await trace.begin(server)
            at, ends = 0, []
            while True:
                at += 1
                [fork] = await server.sandboxes.fork(server.service, CALLER, "it", 1, ())
                before = fork.state
                reached = await ended_at(server, runtime, trace, fork, at, cancelled)
                if fork.state is not before:
                    ends.append(told(fork.state))
                if not reached:
                    break
            [last] = await server.sandboxes.fork(server.service, CALLER, "it", 1, ())
            await trace.end(server, last)
            assert ends, "the last of the forks was not ended"
            assert all(end == told(last.state) for end in ends), f"seed {trace.seed}"


async def ended_at(server: Process, runtime: Watched, trace: Trace, sandbox: Sandbox, at: int, cancelled: bool) -> bool:
    """Have the last run of a trace ended at a suspension; returns whether it came to that.

    A cancel comes before or while the host call is answered, or after the program has ended, whose state then stays.
    """
    before, runtime.num = sandbox.state, 0
    running = asyncio.ensure_future(trace.end(server, sandbox))
    turns = random.Random(f"{trace.seed} {at}").choice([0, 0, 1, 5, 20, 60])

    async def cancel() -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()

    async def hook(number: int) -> bool:
        if number == at and cancelled and turns:
            cancels.append(asyncio.ensure_future(cancel()))
        elif number == at and cancelled:
            running.cancel()
            await asyncio.sleep(0)
        return number == at and not cancelled

    cancels: list[asyncio.Future[None]] = []
    runtime.hook = hook
    [came] = await asyncio.gather(running, return_exceptions=True)
    await asyncio.gather(*cancels)
    runtime.hook = None
    if isinstance(came, asyncio.CancelledError) or (not isinstance(came, BaseException) and came[1].spoiled):
        await idle(server)
        if not (cancelled and turns and sandbox.state is not before):
            assert sandbox.state is before, f"seed {trace.seed}, suspension {at}"
            assert sandbox.worker is None
    else:
        assert not isinstance(came, BaseException), f"seed {trace.seed}, suspension {at}: {came!r}"
        assert cancelled or runtime.num < at
    assert not sandbox.busy
    return runtime.num >= at
