"""What a call of the built-in model costs beside a tool that does nothing, over one window on the engine process.

Run with `make bench-calls`. The window is `mlx-mcp serve` over stdio, as a host starts it, with an engine of its own.
Both tools are called in turns; medians. `generate` computes one token after a prompt of one word, which is new each
time, so that a prompt is encoded, a step computed and a token decoded. Fails if it costs GOAL_MS more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from statistics import median

from mcp import Client, StdioServerParameters

GOAL_MS = 3.0
NO_OP: tuple[str, dict[str, object]] = ("get_result", {})  # it lists the caller's long calls, of which there are none


async def milliseconds(client: Client, tool: str, arguments: dict[str, object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return 1e3 * (time.perf_counter() - began)


async def measure(rounds: int, folder: str) -> tuple[float, float]:
    """The medians of `generate` and of a tool that does nothing, in milliseconds."""
    env = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    env |= {"MLX_MCP_STATE_DIR": folder, "MLX_MCP_STORE_DIR": os.path.join(folder, "store")}
    env["MLX_MCP_ENGINE_IDLE_S"] = "1"
    window = StdioServerParameters(command=sys.executable, args=["-m", "mlx_mcp", "serve"], env=env)
    generated, nothing = list[float](), list[float]()
    async with Client(window) as client:
        await client.call_tool("generate", {"prompt": "Hello.", "max_tokens": 1})  # loads the model
        for number in range(rounds):
            asked: dict[str, object] = {"prompt": str(number), "max_tokens": 1}
            generated.append(await milliseconds(client, "generate", asked))
            nothing.append(await milliseconds(client, *NO_OP))
    return median(generated), median(nothing)


def main() -> None:
    """Measure, print, and end with 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description="What a call costs.")
    parser.add_argument("--rounds", type=int, default=500)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="mlx-") as folder:
        generated, nothing = asyncio.run(measure(rounds, folder))
    print(f"generate {generated:.2f} ms, a tool that does nothing {nothing:.2f} ms: {generated - nothing:.2f} ms more")
    sys.exit(generated - nothing > GOAL_MS)


if __name__ == "__main__":
    main()
