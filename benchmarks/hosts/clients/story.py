"""What every client library does: lists the tools, briefs a session, asks two forks at once, fails, and closes all.

Runs in the library's own virtual environment, so it imports nothing of mlx-mcp.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import Any

Entry = dict[str, Any]  # as hosts' configuration files have it: command and args, or url and headers
Call = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]  # tool, arguments → structured result

TOOLS = [
    "generate",
    "generate_batch",
    "deliberate",
    "get_result",
    "cancel",
    "create_session",
    "fork_session",
    "persist_session",
    "list_sessions",
    "close_session",
    "sandbox_run",
    "reason_over",
    "list_models",
    "load_model",
    "unload_model",
    "count_tokens",
]
FACTS = "The code of Rex is 4096. The code of Kim is 771."
ANSWERS = {"What is the code of Rex?": "4096", "What is the code of Kim?": "771"}


class ToolFailed(Exception):
    """A tool answered with an error; the text is what the library shows its model."""


async def tell(tools: list[str], call: Call) -> None:
    """Go through the story; fails at the first thing that is not as it should be."""
    assert tools == TOOLS, tools
    made = await call("create_session", {"messages": [{"role": "user", "content": FACTS}], "ttl_s": 60})
    forks = await call("fork_session", {"session": made["session"], "count": len(ANSWERS)})
    assert forks["tokens"] == made["tokens"], forks
    questions = zip(forks["sessions"], ANSWERS, strict=True)
    asked = [call("generate", {"session": fork, "prompt": question}) for fork, question in questions]
    for answer, expected in zip(await asyncio.gather(*asked), ANSWERS.values(), strict=True):
        assert answer["text"] == expected, answer
        assert answer["cached_tokens"] >= made["tokens"], answer
    assert "list_sessions" in await refusal(call("generate", {"session": "s_nobody", "prompt": "Hello"}))
    closed = await call("close_session", {"sessions": [made["session"], *forks["sessions"]]})
    assert len(closed["closed"]) == 3, closed


async def refusal(calling: Awaitable[Any]) -> str:
    """What a call fails with; it must fail."""
    try:
        answer = await calling
    except ToolFailed as error:
        return str(error)
    raise AssertionError(f"no error: {answer}")


def main(library: str, connect: Callable[[Entry], AbstractAsyncContextManager[tuple[list[str], Call]]]) -> None:
    """Connect to the server that the command line describes in JSON, go through the story, and print the version."""

    async def run() -> None:
        async with connect(json.loads(sys.argv[1])) as (tools, call):
            await tell(tools, call)

    asyncio.run(run())
    print(library, version(library))
