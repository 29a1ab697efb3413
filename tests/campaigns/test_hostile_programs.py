"""Programs that want out of the sandbox, or want everything there is: each ends in its limits, and gets nothing.

60 in `make test`, 10,000 in `make campaign`. Meanwhile another worker's programs go on.
"""

import asyncio
import json
import os
import random
import secrets
import socket
from pathlib import Path

import pytest

from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits, Worker
from tests.effort import drawn, seconds
from tests.workflows.sandbox.hostile import COLLECTED, drawn_program
from tests.workflows.sandbox.running import encloses_cpython, run, started

NUM = drawn(200, least=60)
SEED = int(os.environ.get("HOSTILE_SEED", "0"))
LIMITS = Limits(seconds=0.05, memory_bytes=48 << 20, output_chars=50_000)
MAX_CALLS = 30  # of the host, in one program: whoever drives a sandbox has a budget
WAIT_S = 60.0  # for one program on a busy machine
ANSWERS = ("yes", None, 3, {"a": [1, "\ud800"]}, "x" * 100_000, [None] * 1000)


class Outside:
    """A file and a port that no program may reach, and what is known of them afterwards."""

    def __init__(self, folder: Path) -> None:
        self.secret = secrets.token_hex(16)
        self.file = folder / "canary"
        self.file.write_text(self.secret)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)

    def named_in(self, program: str) -> str:
        return program.replace("CANARY", str(self.file)).replace("PORT", str(self.listener.getsockname()[1]))

    def check(self) -> None:
        assert self.file.read_text() == self.secret
        with pytest.raises(BlockingIOError):
            self.listener.accept()


@pytest.fixture
def outside(tmp_path):
    outside = Outside(tmp_path)
    yield outside
    outside.listener.close()


@pytest.mark.timeout(seconds(120))
@pytest.mark.parametrize("python", ["monty", pytest.param("cpython", marks=pytest.mark.long)])
async def test_no_hostile_program_gets_out_or_goes_on_and_others_do(outside, python):
    if python == "cpython" and not encloses_cpython():
        pytest.skip("nothing encloses CPython here")
    rng = random.Random(f"hostile {SEED}")
    programs = rng.sample(COLLECTED, min(NUM // 2, len(COLLECTED)))
    programs = [outside.named_in(each) for each in programs + [drawn_program(rng) for _ in range(NUM - len(programs))]]
    waiting = iter(programs)

    async def attack(other: Other) -> None:
        for program in waiting:
            async with started(LIMITS, python=python) as worker:
                try:
                    await asyncio.gather(attacked(worker, program, outside), other.goes_on())
                except TimeoutError:
                    pytest.fail(f"goes on for {WAIT_S} s: {program[:2000]!r}")

    async with started(python=python) as worker:
        other = Other(worker)
        await asyncio.gather(attack(other), attack(other))
        assert other.count == len(programs)
    outside.check()


class Other:
    """Someone else's worker, whose program goes on while hostile ones run."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._turn = worker, asyncio.Lock()
        self.count = 0

    async def goes_on(self) -> None:
        async with self._turn:
            self.count += 1
            ended = await asyncio.wait_for(run(self._worker, "n += 1\nn" if self.count > 1 else "n = 1\nn"), WAIT_S)
            assert ended == Ended(value=self.count)


async def attacked(worker, program: str, outside: Outside) -> None:
    """One program, which ends by itself, by a limit, or by its driver's patience; and it has learnt nothing."""
    step = await asyncio.wait_for(worker.run(program, {"files": {"a.txt": "a\n"}}, 0.0), WAIT_S)
    for number in range(MAX_CALLS):
        if not isinstance(step, HostCall):
            break
        assert outside.secret not in repr((step.args, step.kwargs)), program[:500]
        answered = worker.refuse("SystemExit", "") if step.name == "submit" else worker.answer(ANSWERS[number % 6])
        step = await asyncio.wait_for(answered, WAIT_S)
    printed = worker.take_output()
    assert len(printed) <= LIMITS.output_chars, program[:500]
    assert outside.secret not in printed, program[:500]
    if isinstance(step, Ended):
        assert outside.secret not in json.dumps(step.value), program[:500]
        assert outside.secret not in repr(step.error), program[:500]
        assert len(repr(step.error)) < 10_000, program[:500]
        if not step.spoiled:
            shown = await asyncio.wait_for(worker.variables(), WAIT_S)
            assert outside.secret not in repr(shown), program[:500]
