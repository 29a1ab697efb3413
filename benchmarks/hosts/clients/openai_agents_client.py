"""openai-agents' MCP servers, without an agent: that would need a model elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from agents.mcp import MCPServerStdio, MCPServerStreamableHttp
from story import Call, Entry, ToolFailed, main


@asynccontextmanager
async def connect(entry: Entry) -> AsyncIterator[tuple[list[str], Call]]:
    """By the class for the transport; its own time limit of 5 s for a call is too short for a model."""
    server = MCPServerStreamableHttp if "url" in entry else MCPServerStdio
    async with server(params=entry, client_session_timeout_seconds=120) as client:

        async def call(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
            result = await client.call_tool(tool, arguments)
            if result.is_error:
                raise ToolFailed(result.content[0].text)
            return result.structured_content

        yield [tool.name for tool in await client.list_tools()], call


if __name__ == "__main__":
    main("openai-agents", connect)
