"""Counts the way of a call: the functions and files of mlx_mcp between a tool and the device, and back.

One `generate` of the built-in model, which is in memory, goes through the MCP server. Wherever one of POINTS is called,
the functions that are being carried out on its thread at that moment are noted. All that was noted is the way. What
only prepares something and has returned by then is not on it. `python -m tests.way` lists it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mcp import Client

import mlx_mcp
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire

PACKAGE = str(Path(mlx_mcp.__file__).parent) + "/"
# What happens to a call → where it happens, as a file and a function.
POINTS = {
    "arrives": ("service/jobs.py Jobs.start", "service/generate.py generate"),
    "is taken up": ("engine/client.py EngineClient.generate",),
    "is encoded": ("mlx_backend/chat_template.py Renderer.render", "mlx_backend/tokenizer.py Encoder.encode"),
    "is submitted": ("engine/worker.py EngineThread.send",),
    "is scheduled": ("core/scheduler.py Scheduler.schedule",),
    "is computed": ("mlx_backend/decode_cache.py DecodeCache.attend",),
    "is drawn": ("mlx_backend/sampler.py draw",),
    "is committed": ("core/scheduler.py Scheduler.commit",),
    "is told": ("engine/worker.py EngineThread._emit",),
    "is decoded": ("mlx_backend/answer_reader.py StreamDetokenizer.add", "chat/reader.py Reader.feed"),
    "is answered": ("api/web/translate.py generation", "api/mcp/results.py reply"),
}
CLOCK = (
    "engine/engine.py Engine.check_time"  # tells callers what they wait for, once a second, whatever they have asked
)
EVERY_POINT = frozenset(point for points in POINTS.values() for point in points)


class Way:
    """The functions that a call passes, each as a file and a name, and the points that it was seen at."""

    def __init__(self) -> None:
        self.functions: set[str] = set()
        self.seen: set[str] = set()
        self.noting = False

    @property
    def by_file(self) -> dict[str, list[str]]:
        """The functions of each file."""
        found = defaultdict(list)
        for function in sorted(self.functions):
            file, _, name = function.partition(" ")
            found[file].append(name)
        return dict(found)

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """Note the stack of a point; called with every call on every thread."""
        if not self.noting or event != "call" or (point := function_of(frame)) not in EVERY_POINT:
            return
        stack: set[str] = set()
        at: FrameType | None = frame
        while at is not None:
            stack.add(function_of(at))
            at = at.f_back
        if CLOCK not in stack:
            self.seen.add(point)
            self.functions |= stack - {""}


def function_of(frame: FrameType) -> str:
    """The file and the name of a function of the package; empty for any other."""
    code = frame.f_code
    return f"{code.co_filename.removeprefix(PACKAGE)} {code.co_qualname}" if PACKAGE in code.co_filename else ""


@contextmanager
def watched(way: Way) -> Iterator[None]:
    """Have the way see the calls of this thread and of those that are started meanwhile."""
    threading.setprofile(way.note)
    sys.setprofile(way.note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


async def way_of_a_call() -> Way:
    """The way of one `generate`."""
    way = Way()
    with watched(way):
        engine, _ = wire(Config.load(model="embedded", openblas=False))
        try:
            async with Client(build_server(Service(engine, Registry(None)))) as client:
                loaded = await client.call_tool("load_model", {"model": "embedded"})
                way.noting = True
                made = await client.call_tool("generate", {"prompt": "What is the deploy code?", "max_tokens": 8})
                way.noting = False
                assert not loaded.is_error, loaded
                assert not made.is_error, made
        finally:
            await asyncio.to_thread(engine.close)
    return way


if __name__ == "__main__":
    walked = asyncio.run(way_of_a_call())
    print(f"{len(walked.functions)} functions in {len(walked.by_file)} files")
    for name, functions in walked.by_file.items():
        print(f"  {name:32} {', '.join(functions)}")
