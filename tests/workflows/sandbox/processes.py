"""Server processes over fakes that keep sandboxes in one folder, and sessions in one store, one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.storage.sandbox_log import SandboxLog
from mlx_mcp.workflows.asking import Budget
from mlx_mcp.workflows.sandbox.keeping import Keeping, KeepingOptions
from mlx_mcp.workflows.sandbox.runtime import Limits, Runtime
from mlx_mcp.workflows.sandbox.sandbox import Program, Ran, Sandbox
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes
from tests.fakes import FakeLoader, FakeStore, fake_client
from tests.service.house import CALLER, unheard


@dataclass
class Process:
    """One server: its service, its sandboxes, and how many questions its engine got."""

    service: Service
    sandboxes: Sandboxes
    num_asked: int = 0

    async def run(self, sandbox: Sandbox, code: str, **inputs: Any) -> Ran:
        """Run a program."""
        program = Program(code, inputs)
        return await self.sandboxes.run(self.service, CALLER, sandbox, program, Limits(), Budget(), unheard)

    async def found(self, name: str) -> Sandbox:
        """The caller's sandbox of that name or handle."""
        await self.sandboxes.ready(self.service)
        return self.sandboxes.get(CALLER.tenant, name)


@asynccontextmanager
async def process(
    runtime: Runtime,
    folder: Path | None,
    store: FakeStore | None = None,
    options: KeepingOptions | None = None,
    quota_bytes: int = 1 << 30,
    **settings: Any,
) -> AsyncIterator[Process]:
    """A server that ends at the end of the block as one does that is told to. Without a `folder` it keeps nothing."""

    def open_store() -> FakeStore:
        assert store is not None
        return store

    loader = FakeLoader(context_tokens=2000)
    engine = fake_client(loader, block_tokens=16, open_store=open_store if store is not None else None)
    service = Service(engine, Registry(None))
    keeping = Keeping()
    if folder is not None:
        keeping = Keeping(
            lambda: SandboxLog.open(folder, quota_bytes=quota_bytes), folder.exists, options or KeepingOptions()
        )

    async def open_runtime() -> Runtime:
        return runtime

    made = Process(service, Sandboxes(open_runtime, keeping, **settings))
    for_real = engine.generate

    def generate(request: Any) -> Any:
        made.num_asked += 1
        return for_real(request)

    engine.generate = generate  # type: ignore[method-assign]
    try:
        yield made
    finally:
        await made.sandboxes.end()
        assert engine.close()
