"""What streams over OpenAI's API cost, beside the engine without any API, in one process.

Run with `make bench-streams` (two minutes). A server of the 25M llama; a client in a process of its own reads 16
streams of chat completions at once, and in turn with it the process takes as many answers from its own engine. Fails
if a stream costs more than GOAL of the tokens a second, or its first token comes more than FIRST_MS later.
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
GOAL, FIRST_MS = 0.05, 3.0


async def one_stream(port: int, prompt: str, tokens: int) -> float:
    """Read a stream to its end; returns after how many seconds its first text came."""
    body = {
        "model": "",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "stream": True,
    }
    data = json.dumps(body).encode()
    began, first = time.perf_counter(), 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    async for line in reader:
        if not first and b'"content":"' in line and b'"content":""' not in line:
            first = time.perf_counter() - began
        if line.startswith(b"data: [DONE]"):
            break
    writer.close()
    return first


async def read_streams(port: int, streams: int, tokens: int, seed: int) -> None:
    """What the other process does: the streams at once, and their times as JSON on stdout."""
    chance = random.Random(seed)
    prompts = [str(chance.random()) for _ in range(streams)]
    began = time.perf_counter()
    firsts = await asyncio.gather(*(one_stream(port, prompt, tokens) for prompt in prompts))
    print(json.dumps({"seconds": time.perf_counter() - began, "first": median(firsts)}))


async def over_http(port: int, streams: int, tokens: int, seed: int) -> tuple[float, float]:
    """Seconds for all streams, and until the first token."""
    command = [sys.executable, __file__, "--client", str(port), str(streams), str(tokens), str(seed)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    told, _ = await process.communicate()
    found = json.loads(told.splitlines()[-1])
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


async def measure(rounds: int, folder: Path) -> bool:
    """Both, in turns; returns whether the goals are met."""
    config = Config.load(model=str(folder), port=0)
    client, registry = wire(config)
    service, listener = Service(client, registry), listen("127.0.0.1", 0)
    app: ASGIApp = web_app(service, Activity(), config)
    server, port = HttpServer(app, config), listener.getsockname()[1]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    ways: dict[str, Callable[[int, int, int], Awaitable[tuple[float, float]]]] = {
        "the service": lambda *asked: by_service(service, *asked),
        "OpenAI's API": lambda *asked: over_http(port, *asked),
    }
    seconds = {name: list[float]() for name in ways}
    firsts = {name: list[float]() for name in ways}
    for number in range(-1, rounds):  # the first, which loads the model, is not counted
        for index, (name, way) in enumerate(ways.items()):
            seed = 4 * number + 2 * index  # each way has prompts of its own: nothing of them is cached
            all_of_them, _ = await way(STREAMS, TOKENS, seed)
            _, first = await way(1, 4, seed + 1)
            if number >= 0:
                seconds[name].append(all_of_them)
                firsts[name].append(first)
    server.should_exit = True
    await serving
    client.close()
    bare, api = (median(seconds[name]) for name in ways)
    first_bare, first_api = (1e3 * median(firsts[name]) for name in ways)
    for name in ways:
        rate = STREAMS * TOKENS / median(seconds[name])
        print(f"{name:13} {rate:6.0f} tokens/s, first after {1e3 * median(firsts[name]):.1f} ms")
    print(f"throughput {1 - bare / api:+.1%}, first token {first_api - first_bare:+.1f} ms")
    return 1 - bare / api <= GOAL and first_api - first_bare <= FIRST_MS


def main() -> None:
    """Measure, and end with 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description="What streams cost.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--client", type=int, nargs=4, metavar=("PORT", "STREAMS", "TOKENS", "SEED"))
    given = parser.parse_args()
    if given.client:
        asyncio.run(read_streams(*given.client))
        return
    with tempfile.TemporaryDirectory(prefix="mlx-") as folder:
        made, _ = llama.make_folder(Path(folder) / "llama", short=False)
        print()
        sys.exit(not asyncio.run(measure(given.rounds, made)))


if __name__ == "__main__":
    main()
