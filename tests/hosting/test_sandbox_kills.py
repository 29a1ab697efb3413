"""The whole server with the built-in model, killed at random moments while programs run in a sandbox that it keeps."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from pathlib import Path

import pytest
from mcp import Client

from tests.effort import drawn
from tests.hosting.test_kills import Server, call, fact, found

KILLS = drawn(20, least=3)
BADGES = {"Alice": "771", "Bob": "208", "Carol": "530"}
BEGIN = "n, answers = 0, []\nremember(context, 'badges')"
ASK = """
questions = [f"What is {name}'s badge?" for name in ('Alice', 'Bob', 'Carol')]
answers.append(llm_query_batched(questions, over='badges'))
n += 1
submit(n)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_kill_loses_a_run_that_was_answered_and_what_a_sandbox_remembers_is_there(tmp_path: Path) -> None:
    draw, acknowledged = random.Random(1), [-1]  # the number of the latest run that was answered

    async def life(url: str, server: Server) -> None:
        async with Client(url) as client:
            if acknowledged[0] < 0:
                text = " ".join(fact(name, number) for name, number in BADGES.items())
                await call(client, "sandbox_run", name="it", context=text, code=BEGIN)
                await call(client, "persist_session", session="it")
                acknowledged[0] = 0
            ran = await call(client, "sandbox_run", sandbox="it", code="submit([n, answers])")
            n, answers = ran["value"]
            assert acknowledged[0] <= n <= acknowledged[0] + 1
            assert answers == [list(BADGES.values())] * n
            acknowledged[0] = n
            ran = await call(client, "sandbox_run", sandbox="it", code=ASK)
            assert ran["value"] == n + 1
            acknowledged[0] = n + 1
            timer = threading.Timer(draw.uniform(0, 1.0), server.kill)
            timer.start()
            while True:
                ran = await call(client, "sandbox_run", sandbox="it", code=ASK)
                acknowledged[0] = ran["value"]

    for _ in range(KILLS):
        with Server(tmp_path / "store") as server:
            with pytest.raises(BaseException) as ended:  # noqa: PT011  # whatever a client makes of a dead server
                asyncio.run(life(server.url, server))
            failed = found(ended.value, AssertionError)
            if failed is not None:
                raise failed
            assert server.process.wait(10) == -signal.SIGKILL, ended.value
    assert acknowledged[0] >= KILLS
