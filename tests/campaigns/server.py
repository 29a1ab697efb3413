"""Serves all APIs over a fake engine in a process of its own, whose memory can be looked at: `serving` starts one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from tests.fakes import FakeLoader, fake_client


@dataclass
class Server:
    """A server that runs, and what the system says of its process."""

    address: str
    pid: int

    @property
    def rss_bytes(self) -> int:
        """Its memory."""
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def num_fds(self) -> int:
        """Its descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def num_threads(self) -> int:
        """Its threads."""
        return len(os.listdir(f"/proc/{self.pid}/task"))


@contextlib.contextmanager
def serving(**environment: str) -> Iterator[Server]:
    """Run a server with more environment variables."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.campaigns.server"],
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield Server(process.stdout.readline().strip(), process.pid)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def serve() -> None:
    """Serve until this process is killed."""
    from mlx_mcp.config import Config
    from mlx_mcp.hosting.allowances import limiter_of
    from tests.api.http.routes import serving_all

    loader = FakeLoader(context_tokens=1 << 20)
    # A fake runner remembers every step, which would pass for a leak.
    loader.runner.steps = cast(Any, deque(maxlen=4))
    engine = fake_client(loader)
    async with serving_all(engine, limits=limiter_of(Config.load())) as address:
        print(address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
