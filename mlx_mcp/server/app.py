"""Builds the MCP server: who it is, and its tools."""

from __future__ import annotations

from typing import Any

from mcp.server.mcpserver import MCPServer

from mlx_mcp import __version__
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.models.registry import Registry
from mlx_mcp.server.calls import Activity
from mlx_mcp.server.files import FileReader
from mlx_mcp.server.tools import make_tools

INSTRUCTIONS = (
    "Local language models on this machine. `generate` answers one prompt; run several calls in parallel for "
    "independent pieces of work, or `generate_batch` for many over one context. Where several calls begin alike, "
    "compute that beginning once with `create_session` and give each sub-agent a fork of it (`fork_session`). In a "
    "session `prompt` is the next turn: send only what is new. Nothing leaves the machine. `list_models` says which "
    "models there are."
)


def build_server(
    client: EngineClient,
    registry: Registry,
    files: FileReader | None = None,
    activity: Activity | None = None,
    **settings: Any,
) -> MCPServer[Any]:
    """An MCP server on an engine client; many servers (one per connection) may share one client.

    Callers can have `files` read, none if there is no reader; what they do is noted in `activity`. `settings` go to
    MCPServer as they are; see its own documentation.
    """
    return MCPServer(
        "mlx-mcp",
        title="mlx-mcp: local MLX models",
        instructions=INSTRUCTIONS,
        version=__version__,
        tools=make_tools(client, registry, files, activity),
        log_level="WARNING",
        **settings,
    )
