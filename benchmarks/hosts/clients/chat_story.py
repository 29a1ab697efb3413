"""What every client of the chat API does: has a streamed answer, for which the model calls one tool.

Runs in the client's own virtual environment, so it imports nothing of mlx-mcp.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any

MODEL = "embedded"
PROMPT = "Look up Bob's badge."
KEY, BADGE = "Bob's badge", "342"

ASKED: list[str] = []  # what the tool was called with


def lookup(key: str) -> str:
    """Find what is on file."""
    ASKED.append(key)
    return BADGE


# Address of the API, token → the pieces of the answer in which the whole ends, after the tool was called.
Chat = Callable[[str, str], Coroutine[Any, Any, list[str]]]


def main(client: str, chat: Chat) -> None:
    """Chat with the server that the command line names, see that all is as it should be, and print the version."""
    pieces = asyncio.run(chat(sys.argv[1], sys.argv[2]))
    assert ASKED == [KEY], ASKED
    assert "".join(pieces).strip() == BADGE, pieces
    assert len(pieces) > 1, f"{pieces} is no stream"
    print(client, version(client))
