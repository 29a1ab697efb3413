"""The whole product, as a process of its own that serves a model folder over HTTP, and a real MCP client of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from mcp import Client

ANSWER_S = 900  # how long a call may take on a busy machine


class Product:
    """`mlx-mcp serve --http`."""

    def __init__(self, folder: Path, **settings: object) -> None:
        env = (
            os.environ
            | {"MLX_MCP_OPENBLAS": "1", "MLX_MCP_WAIT_S": str(ANSWER_S)}
            | {f"MLX_MCP_{name.upper()}": str(v) for name, v in settings.items()}
        )
        command = [sys.executable, "-m", "mlx_mcp", "serve", "--standalone", "--http", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--model", folder], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
        )
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"(http://\S+)/mcp", line):
                self.root = found[1]
                break
        else:
            raise AssertionError(f"it did not start: {''.join(said)}")
        # Handed on, as a full pipe would stop it; pytest shows what a failing test's server said.
        self.reader = threading.Thread(target=sys.stderr.writelines, args=(self.process.stderr,), daemon=True)
        self.reader.start()

    def kill(self) -> None:
        """End it at once, with no chance to save anything."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join(60)
        assert self.process.stderr is not None, "a pipe"
        self.process.stderr.close()

    def health(self) -> dict[str, Any]:
        """What it says of itself."""
        with urllib.request.urlopen(f"{self.root}/health", timeout=60) as answer:
            health: dict[str, Any] = json.load(answer)
        return health


@contextlib.contextmanager
def serving(folder: Path, **settings: object) -> Iterator[Product]:
    """A product that ends with the block."""
    product = Product(folder, **settings)
    try:
        yield product
    finally:
        product.kill()


class Host:
    """One client. Every method is a tool, every result what it returned."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def call(self, tool: str, progress: Any = None, **arguments: Any) -> dict[str, Any]:
        """Call a tool, which must not fail."""
        result = await self.client.call_tool(tool, arguments, progress_callback=progress)
        assert not result.is_error, result.content
        structured: dict[str, Any] = result.structured_content
        return structured

    async def generate(self, prompt: str, **arguments: Any) -> dict[str, Any]:
        """Of `generate`."""
        return await self.call("generate", prompt=prompt, **arguments)

    async def refusal(self, tool: str, **arguments: Any) -> str:
        """What a call that must fail says."""
        result = await self.client.call_tool(tool, arguments)
        assert result.is_error
        said: Any = result.content[0]
        return str(said.text)


@contextlib.asynccontextmanager
async def hosting(product: Product) -> AsyncIterator[Host]:
    """A client that is connected until the end of the block."""
    async with Client(f"{product.root}/mcp", read_timeout_seconds=ANSWER_S) as client:
        yield Host(client)
