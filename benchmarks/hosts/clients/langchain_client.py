"""langchain-mcp-adapters: tools for an agent, each of whose calls opens a connection of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from langchain_mcp_adapters.client import MultiServerMCPClient
from story import Call, Entry, ToolFailed, main


@asynccontextmanager
async def connect(entry: Entry) -> AsyncIterator[tuple[list[str], Call]]:
    """By the tools that an agent is given, called as a model's tool calls are."""
    client = MultiServerMCPClient({"mlx": {"transport": "http" if "url" in entry else "stdio", **entry}})
    tools = {tool.name: tool for tool in await client.get_tools()}

    async def call(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        message = await tools[tool].ainvoke({"type": "tool_call", "id": "1", "name": tool, "args": arguments})
        if message.status == "error":
            raise ToolFailed(str(message.content))
        return message.artifact["structured_content"]

    yield list(tools), call


if __name__ == "__main__":
    main("langchain-mcp-adapters", connect)
