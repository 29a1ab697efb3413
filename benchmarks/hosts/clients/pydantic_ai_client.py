"""pydantic-ai's toolset, without an agent: that would need a model elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pydantic_ai import ModelRetry
from pydantic_ai.mcp import MCPToolset, StdioTransport
from story import Call, Entry, ToolFailed, main


@asynccontextmanager
async def connect(entry: Entry) -> AsyncIterator[tuple[list[str], Call]]:
    """By a URL or a transport. Its time limit of 5 s for the first answer is kept: the engine runs already."""
    if "url" in entry:
        toolset = MCPToolset(entry["url"], headers=entry.get("headers"))
    else:
        toolset = MCPToolset(StdioTransport(entry["command"], entry["args"]))
    async with toolset:

        async def call(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
            try:
                return await toolset.direct_call_tool(tool, arguments)
            except ModelRetry as error:
                raise ToolFailed(str(error)) from error

        yield [tool.name for tool in await toolset.list_tools()], call


if __name__ == "__main__":
    main("pydantic-ai-slim", connect)
