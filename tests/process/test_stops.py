"""Engines that are stopped while calls are under way, again and again: nothing that was asked is lost."""

import asyncio
import os
import random
import signal

import pytest
from mcp import Client

from tests.effort import drawn
from tests.process.test_one_engine import HttpListener
from tests.process.windows import Window, is_alive, run, state_folder, status, wait_until

COUNT = {"prompt": "Count from 1 to 20.", "max_tokens": 30}
PATIENT = {"MLX_MCP_SHUTDOWN_TIMEOUT_S": "60"}  # a busy machine must not be what cuts calls off


def ended_by(place, env, how):
    """Have the engine end: by a signal, by the command, or for a window of another version."""
    engine = status(place)["pid"]
    if how == "signal":
        os.kill(engine, signal.SIGTERM)
    else:
        assert run(env, "engine", "stop").returncode == 0
    return engine


@pytest.mark.long
@pytest.mark.parametrize("how", ["signal", pytest.param("command", marks=pytest.mark.slow)])
def test_windows_get_every_answer_whenever_their_engine_is_stopped(how):
    rng = random.Random(how)
    with state_folder(**PATIENT) as (place, env), Window(env) as one, Window(env, era="modern") as other:
        for _ in range(drawn(4)):
            one.generate()  # the model is loaded
            calls = [
                (window, window.call("generate", **COUNT | {"seed": i})) for i in range(4) for window in (one, other)
            ]
            if rng.random() < 0.5:
                # On a busy machine all may be answered before the engine is asked how it is.
                wait_until(lambda: status(place)["rows"] > 0 or not (one.lines.empty() and other.lines.empty()))
            else:  # some are still on their way
                pass
            ended_by(place, env, how)
            # What is asked while it ends is carried out by the next one.
            calls += [(window, window.call("generate", **COUNT)) for window in (one, other)]
            for window, call in calls:
                result = window.answer(call)["result"]
                assert not result.get("isError"), result


@pytest.mark.long
def test_http_clients_get_every_answer_whenever_the_engine_is_stopped():
    async def calls(address, stop):
        async with Client(address, mode="auto") as client:
            await client.call_tool("generate", COUNT)
            tasks = [asyncio.create_task(client.call_tool("generate", COUNT | {"seed": i})) for i in range(8)]
            await asyncio.to_thread(stop, tasks)
            return await asyncio.gather(*tasks)

    with state_folder(**PATIENT) as (place, env), HttpListener(env) as listener:
        ended = []

        def stop(tasks):
            wait_until(lambda: status(place)["rows"] > 0 or any(task.done() for task in tasks))
            ended.append(ended_by(place, env, "signal"))

        for _ in range(drawn(4)):
            results = asyncio.run(calls(listener.address, stop))
            wait_until(lambda: not is_alive(ended[-1]))  # it takes connections for a moment yet
            assert [result.is_error for result in results] == [False] * 8, results
