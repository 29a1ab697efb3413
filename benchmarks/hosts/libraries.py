"""Client libraries, each in its own virtual environment as its users have it; what they do is in clients/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.hosts.clients.story import TOOLS
from benchmarks.hosts.place import NODE, WORK, run

CLIENTS = Path(__file__).parent / "clients"
# Each has a virtual environment of its name.
PYTHON = ["fastmcp", "langchain", "openai_agents", "pydantic_ai"]  # clients of MCP
CHATTING = ["langchain", "litellm", "llm", "openai_agents", "pydantic_ai"]  # clients of OpenAI's API


def tells(library: str, entry: dict[str, Any]) -> str:
    """The library goes through the story with the server of an entry; returns its name and version."""
    if library == "typescript":
        return run(NODE / "node", CLIENTS / "typescript_client.mjs", json.dumps(entry), json.dumps(TOOLS), cwd=WORK)
    return run(WORK / library / "bin" / "python", CLIENTS / f"{library}_client.py", json.dumps(entry))


def chats(client: str, address: str, token: str) -> str:
    """The client has a streamed answer, for which the model calls a tool; returns its name and version."""
    if client == "ai_sdk":
        return run(NODE / "node", CLIENTS / "chat_ai_sdk_client.mjs", address, token, cwd=WORK)
    return run(WORK / client / "bin" / "python", CLIENTS / f"chat_{client}_client.py", address, token)
