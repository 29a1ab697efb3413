"""Kills a server at a suspension of a program, or the program's worker, again and again, and looks at what is left.

A program of its own, for it forks: `python -m tests.workflows.sandbox.kill_loop --kills 20`. Each child runs programs
in the real interpreter, over a model of fakes. At a drawn suspension it kills the process of its worker and looks at
the state itself; at a later one it kills itself. Then another child looks at what is on disk: the state of the latest
run that was answered, or of the one that was about to be. It rebuilds the state from the journal beside that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox.journal import replay
from mlx_mcp.workflows.sandbox.monty import open_runtime
from mlx_mcp.workflows.sandbox.monty_worker import MontyWorker
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits, Runtime, Worker
from mlx_mcp.workflows.sandbox.sandbox import Sandbox
from tests.fakes import FakeStore
from tests.service.house import CALLER
from tests.storage.world import scratch
from tests.workflows.sandbox.processes import Process, process

NUM_RUNS = 4
FUNCTIONS = ["llm_query", "llm_query_batched", "llm_map", "llm_ask", "remember", "submit"]
WAIT_S = 30.0
Suspended = Callable[["Watched"], None]

LINES = (
    "seen.append(llm_query('{0}?'))",
    "seen += llm_query_batched(['{0} a', '{0} b'])",
    "seen += llm_map('Say {0}', [1, 2])",
    "seen.append(remember('The text {0}.', name='it'))",
    "try:\n    seen.append(llm_query('and?', over='it'))\nexcept ValueError as error:\n    seen.append('unknown')",
    "try:\n    llm_map('Say {0}')\nexcept TypeError as error:\n    seen.append('wrong')",
    "print(len(seen), random.random())",
    "drawn = [random.random(), time.time(), {{'n': n}}]",
)
ENDS = ("", "", "submit(n)", "raise KeyError('as drawn')")


def code_of(seed: int, run: int) -> str:
    """The program of a run."""
    rng = random.Random(f"{seed} {run}")
    first = "import random, time\nn = 0\nseen = []" if run == 0 else "n += 1"
    lines = [rng.choice(LINES).format(f"{run}{each}") for each in range(rng.randrange(1, 5))]
    return "\n".join([first, *lines, rng.choice(ENDS)])


class Watched:
    """A worker of the real interpreter, of whose suspensions a test hears."""

    def __init__(self, worker: Worker, suspended: Suspended) -> None:
        assert isinstance(worker, MontyWorker)
        self.worker, self._suspended = worker, suspended

    def kill(self) -> None:
        """End the process, as the system would."""
        os.kill(self.pid, signal.SIGKILL)

    @property
    def pid(self) -> int:
        """Its process."""
        assert self.worker._process is not None
        assert self.worker._process._pid is not None
        return self.worker._process._pid

    async def run(self, code: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
        return self._seen(await self.worker.run(code, inputs, moment))

    async def answer(self, value: Any) -> HostCall | Ended:
        return self._seen(await self.worker.answer(value))

    async def refuse(self, type: str, message: str) -> HostCall | Ended:
        return self._seen(await self.worker.refuse(type, message))

    def _seen(self, step: HostCall | Ended) -> HostCall | Ended:
        if isinstance(step, HostCall):
            self._suspended(self)
        return step

    async def dump(self) -> bytes:
        return await self.worker.dump()

    async def load(self, dump: bytes) -> HostCall | None:
        return await self.worker.load(dump)

    async def variables(self) -> dict[str, str]:
        return await self.worker.variables()

    def take_output(self) -> str:
        return self.worker.take_output()

    async def close(self) -> None:
        await self.worker.close()


class WatchedRuntime:
    """The real interpreter, of whose suspensions a test hears."""

    def __init__(self, runtime: Runtime, suspended: Suspended) -> None:
        self.runtime, self.isolation, self.version = runtime, runtime.isolation, runtime.version
        self._suspended = suspended

    async def start(self, limits: Limits, functions: Collection[str]) -> Worker:
        return Watched(await self.runtime.start(limits, functions), self._suspended)

    async def close(self) -> None:
        await self.runtime.close()


async def live(folder: Path, seed: int, pipe: int) -> None:
    """Run programs until killed, or until there is nothing left to do."""
    rng = random.Random(seed)
    kills = {rng.randrange(1, 12): "worker", rng.randrange(4, 16): "server"}
    num = 0

    def suspended(worker: Watched) -> None:
        nonlocal num
        num += 1
        if kills.get(num) == "server":
            os.write(pipe, f"pid {worker.pid}\nkilled server\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        if kills.get(num) == "worker":
            os.write(pipe, b"killed worker\n")
            worker.kill()

    runtime = WatchedRuntime(await open_runtime(folder), suspended)
    async with process(runtime, folder, FakeStore()) as server:
        sandbox = await server.sandboxes.create(server.service, CALLER, "it")
        for run in range(NUM_RUNS):
            before = sandbox.state
            if await death(server, sandbox, code_of(seed, run)):
                assert sandbox.state is before, f"run {run}: a run whose worker died has changed the state"
                why = await death(server, sandbox, code_of(seed, run))
                assert not why, f"run {run} cannot be repeated: {why}"
            os.write(pipe, f"ended {run}\n".encode())


async def death(server: Process, sandbox: Sandbox, code: str) -> str:
    """Run a program; returns of what its worker died, if it did. That may be after the end, before the dump."""
    try:
        ended = (await server.run(sandbox, code)).ended
    except SandboxFailed as error:
        return str(error)
    return str(ended.error) if ended.spoiled else ""


async def look(folder: Path, seed: int, num_ended: int) -> None:
    """What is on disk is a state that may be there, and the journal gives the same without a question."""
    runtime = await open_runtime(folder)
    async with process(runtime, folder) as server:
        await server.sandboxes.ready(server.service)
        sandbox = server.sandboxes.find(CALLER.tenant, "it")
        if sandbox is None:
            assert num_ended == 0, f"{num_ended} runs were answered, and nothing is on disk"
            return
        state = await server.sandboxes.keeping.state_of(sandbox)
        cells = list(state.journal.cells())
        assert num_ended <= len(cells) <= num_ended + 1, f"{num_ended} runs were answered, {len(cells)} are on disk"
        assert [cell.code for cell in cells] == [code_of(seed, run) for run in range(len(cells))]
        worker = await runtime.start(Limits(), FUNCTIONS)
        await replay(state.journal, worker)
        again = await runtime.start(Limits(), FUNCTIONS)
        await again.load(state.dump)
        for name in ("n", "seen", "drawn"):
            assert await worker.run(name) == await again.run(name), f"{name} is another after a replay"
        assert await again.run("n") == Ended(len(cells) - 1)
        assert server.num_asked == 0, "a replay asked"
        await check_going_on(server, seed)


async def check_going_on(server: Process, seed: int) -> None:
    """The sandbox goes on."""
    ran = await server.run(await server.found("it"), "n += 1\nlen(seen)")
    assert ran.ended.error is None, ran.ended


def forked(work: Callable[[int], Any]) -> tuple[list[str], int]:
    """What a child wrote into its pipe, and how it ended."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            asyncio.run(work(writing))
        except BaseException as error:
            os.write(writing, f"failed {error!r} from {error.__cause__!r}"[:4000].replace("\n", " ").encode() + b"\n")
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        said = lines.read().splitlines()
    return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_gone(pid: int) -> bool:
    """Whether a process ends by itself in time."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.01)
    return False


def check(seed: int) -> dict[str, Any]:
    """One child and what it leaves: what was killed, and what was wrong."""
    with scratch() as parent:
        folder = parent / "kept"  # what the system has taken outlives the process, if not a power cut
        said, status = forked(lambda pipe: live(folder, seed, pipe))
        wrong = [line for line in said if line.startswith("failed")]
        if status not in (0, -signal.SIGKILL):
            wrong.append(f"it ended with {status}")
        num_ended = sum(line.startswith("ended") for line in said)
        wrong += [
            f"worker {line[4:]} lives on" for line in said if line.startswith("pid") and not is_gone(int(line[4:]))
        ]
        looked, status = forked(lambda pipe: look(folder, seed, num_ended))
        wrong += looked if status else []
        return {"seed": seed, "killed": [line.split()[1] for line in said if line.startswith("killed")], "wrong": wrong}


def main() -> None:
    """Kill so often, and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    killed, violations, seed = {"server": 0, "worker": 0}, [], given.seed
    while sum(killed.values()) < given.kills:
        came = check(seed)
        seed += 1
        for each in came["killed"]:
            killed[each] += 1
        violations += [came] if came["wrong"] else []
        if len(violations) > 5:
            break
    json.dump({"killed": killed, "violations": violations, "cases": seed - given.seed}, sys.stdout)


if __name__ == "__main__":
    main()
