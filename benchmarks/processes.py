"""A server as a process: how it is started, what it wrote, and that it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_mcp.mlx_backend.cpu.openblas import find_openblas

BLAS = find_openblas()
START_S = 60  # how long a server may take to start


class ServerFailed(Exception):
    """A server did not start or did not answer; says what it wrote last."""


@dataclass(frozen=True)
class Process:
    """A server that runs."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def failed(self, what: str) -> ServerFailed:
        """The error that says so."""
        code = self.popen.poll()
        state = "It runs." if code is None else f"It has ended with {code}."
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        return ServerFailed(f"{self.name} {what}. {state} The end of what it wrote:\n{tail}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and its children, if it runs."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, number)

    async def started(self, find: Callable[[], Awaitable[str | None]]) -> str:
        """What `find` finds, once it does."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.popen.poll() is None:
            if found := await find():
                return found
            await asyncio.sleep(0.05)
        raise self.failed(f"did not start within {START_S} s" if self.popen.poll() is None else "did not start")


@contextmanager
def running(name: str, command: list[str], folder: Path, blas: bool = True) -> Iterator[Process]:
    """Run a server, with its settings and caches in `folder`; it is ended whatever happens.

    `blas` is whether OpenBLAS is put in front.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLX_MCP_")}
    env |= {"MLX_MCP_CONFIG": str(folder / "config.toml"), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    env |= {"MLX_MCP_STORE_DIR": str(folder / "store"), "HOME": str(folder)}
    if BLAS is not None and blas:
        env["LD_PRELOAD"] = BLAS
    env["MLX_MCP_OPENBLAS"] = str(int(blas))
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, start_new_session=True
        )
    process = Process(name, popen, log)
    try:
        yield process
    finally:
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGCONT)
        try:
            popen.wait(20)
        except subprocess.TimeoutExpired:
            process.signal(signal.SIGKILL)
            popen.wait()
