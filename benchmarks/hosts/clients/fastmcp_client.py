"""fastmcp's client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastmcp import Client
from fastmcp.exceptions import ToolError
from story import Call, Entry, ToolFailed, main


@asynccontextmanager
async def connect(entry: Entry) -> AsyncIterator[tuple[list[str], Call]]:
    """By the configuration that fastmcp shares with hosts."""
    async with Client({"mcpServers": {"mlx": entry}}) as client:

        async def call(tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
            try:
                return (await client.call_tool(tool, arguments)).structured_content
            except ToolError as error:
                raise ToolFailed(str(error)) from error

        yield [tool.name for tool in await client.list_tools()], call


if __name__ == "__main__":
    main("fastmcp", connect)
