"""What streams over OpenAI's API cost, beside the engine without any API, in one process.

Run with `make bench-streams` (two minutes). A server of the 25M llama; `stream_reader.py`, a process of its own, reads
16 streams of chat completions at once, and in turn with it this process takes as many answers from its own engine.
Fails if a stream costs more than GOAL of the tokens a second, or its first token comes more than FIRST_MS later.

Of both ways it also tells the processor time of the server's event loop for a token, which another load of the machine
does not change.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import engine  # noqa: F401  # first: it puts OpenBLAS in front of MLX, and the root of this tree on the path
import llama
from starlette.types import ASGIApp

from mlx_mcp.chat.message import Message
from mlx_mcp.config import Config
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.engine.requests import Delta
from mlx_mcp.hosting.faces import web_app
from mlx_mcp.hosting.http import HttpServer
from mlx_mcp.process.listener import listen
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options, stream
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire

STREAMS, TOKENS = 16, 96
FIRSTS = 5  # single streams of each round, for the first token
GOAL, FIRST_MS = 0.05, 3.0

# Streams, tokens of each, and a seed → seconds for all, and until the first token of one (the median).
Way = Callable[[int, int, int], Awaitable[tuple[float, float]]]


@dataclass
class Figures:
    """What was measured of one way."""

    seconds: list[float] = field(default_factory=list)  # for STREAMS streams
    firsts: list[float] = field(default_factory=list)  # until the first token of one
    loop_s: list[float] = field(default_factory=list)  # processor time of the event loop for a token


async def start_reader() -> asyncio.subprocess.Process:
    """The client, which waits for what to read: its start, and the imports of this file, are no part of a stream."""
    reader = Path(__file__).with_name("stream_reader.py")
    return await asyncio.create_subprocess_exec(sys.executable, reader, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def over_http(reader: asyncio.subprocess.Process, port: int, *asked: int) -> tuple[float, float]:
    """Streams that the client reads."""
    assert reader.stdin is not None, "it is a pipe"
    assert reader.stdout is not None, "it is a pipe"
    reader.stdin.write(" ".join(map(str, (port, *asked))).encode() + b"\n")
    found = json.loads(await reader.stdout.readline())
    return found["seconds"], found["first"]


async def by_service(service: Service, streams: int, tokens: int, seed: int) -> tuple[float, float]:
    """The same, of the service without any API."""
    chance, began, firsts = random.Random(seed), time.perf_counter(), list[float]()

    async def one(prompt: str) -> None:
        context = Context(messages=(Message("user", prompt),))
        options, first = Options(sampling=Sampling(max_tokens=tokens)), 0.0
        async for update in stream(service, Caller(), context, options):
            if not first and isinstance(update, Delta):
                first = time.perf_counter() - began
        firsts.append(first)

    await asyncio.gather(*(one(str(chance.random())) for _ in range(streams)))
    return time.perf_counter() - began, median(firsts)


async def take_turns(ways: dict[str, Way], rounds: int) -> dict[str, Figures]:
    """What each way takes. Each prompt is a new one: nothing of it is cached."""
    figures, seed = {name: Figures() for name in ways}, 0
    for number in range(-1, rounds):  # the first, which loads the model, is not counted
        for streams, tokens, times in ((STREAMS, TOKENS, 1), (1, 4, FIRSTS)):
            for name, way in list(ways.items()) * times:
                seed, spent = seed + 1, time.thread_time()
                seconds, first = await way(streams, tokens, seed)
                if number < 0:
                    continue
                if streams == 1:
                    figures[name].firsts.append(first)
                else:
                    figures[name].seconds.append(seconds)
                    figures[name].loop_s.append((time.thread_time() - spent) / (streams * tokens))
    return figures


async def measure(rounds: int, folder: Path, model: Path) -> bool:
    """Both ways, in turns; returns whether the goals are met."""
    config = Config.load(model=str(model), port=0, store_dir=folder / "store")
    client, registry = wire(config)
    service, listener = Service(client, registry), listen("127.0.0.1", 0)
    app: ASGIApp = web_app(service, Activity(), config)
    server, port = HttpServer(app, config), listener.getsockname()[1]
    serving, reader = asyncio.create_task(server.serve(sockets=[listener])), await start_reader()
    ways: dict[str, Way] = {
        "the service": lambda *asked: by_service(service, *asked),
        "OpenAI's API": lambda *asked: over_http(reader, port, *asked),
    }
    figures = await take_turns(ways, rounds)
    assert reader.stdin is not None, "it is a pipe"
    reader.stdin.close()
    await reader.wait()
    server.should_exit = True
    await serving
    client.close()
    return told(figures)


def told(figures: dict[str, Figures]) -> bool:
    """Print the figures of both ways; returns whether the goals are met."""
    for name, found in figures.items():
        rate, loop_us = STREAMS * TOKENS / median(found.seconds), 1e6 * min(found.loop_s)
        first_ms = 1e3 * median(found.firsts)
        print(
            f"{name:13} {rate:6.0f} tokens/s, first after {first_ms:.1f} ms, the loop at work {loop_us:.0f} us a token"
        )
    bare, api = figures.values()
    cost = 1 - median(bare.seconds) / median(api.seconds)
    later_ms = 1e3 * (median(api.firsts) - median(bare.firsts))
    print(f"the API costs {cost:.1%} of the throughput, and {later_ms:+.1f} ms to the first token")
    return cost <= GOAL and later_ms <= FIRST_MS


def main() -> None:
    """Measure, and end with 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description="What streams cost.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--short", action="store_true", help="with a model of almost nothing: only the loop's time counts"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlx-") as made:
        folder = Path(made)
        model, _ = llama.make_folder(folder / "llama", short=given.short)
        print()
        sys.exit(not asyncio.run(measure(given.rounds, folder, model)))


if __name__ == "__main__":
    main()
