"""Builds the MCP server: who it is, and its tools."""

from __future__ import annotations

from typing import Any

from mcp import MCPError
from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext
from mcp.server.mcpserver import MCPServer
from mcp_types import INVALID_PARAMS
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

from mlx_mcp import __version__
from mlx_mcp.api.mcp.tasks import Tasks
from mlx_mcp.api.mcp.tools import make_tools
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service

RESOURCE_NOT_FOUND = -32002  # up to 2025-11-25; later versions have INVALID_PARAMS for it (SEP-2164)
INSTRUCTIONS = (
    "Local language models on this machine. `generate` answers one prompt; run several calls in parallel for "
    "independent pieces of work, or `generate_batch` for many over one context. Where several calls begin alike, "
    "compute that beginning once with `create_session` and give each sub-agent a fork of it (`fork_session`). In a "
    "session `prompt` is the next turn: send only what is new. Nothing leaves the machine. `list_models` says which "
    "models there are."
)


def build_server(
    service: Service,
    files: FileReader | None = None,
    activity: Activity | None = None,
    wait_s: float | None = None,
    **settings: Any,
) -> MCPServer[Any]:
    """An MCP server on a service; many servers (one per connection) may share an engine.

    Callers can have `files` read, none if there is no reader; what they do is noted in `activity`. `wait_s` is how long
    a call is waited for before it is answered with a handle; None leaves that to the host's name. `settings` go to
    MCPServer as they are; see its own documentation.
    """
    server = MCPServer[Any](
        "mlx-mcp",
        title="mlx-mcp: local MLX models",
        instructions=INSTRUCTIONS,
        version=__version__,
        tools=make_tools(service, files, activity, wait_s),
        extensions=[Tasks(service.jobs)],
        log_level="WARNING",
        **settings,
    )
    server.middleware.append(as_specified(server))
    return server


def as_specified(server: MCPServer[Any]) -> ServerMiddleware[Any]:
    """Has a server advertise no prompts and resources while it has none, and give unknown ones the specified code.

    The SDK advertises both always, answers to an unknown prompt as to a fault of its own, with a traceback in the log,
    and to an unknown resource with the code of the newest protocol version in all of them.
    """

    async def handle(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method == "prompts/get":
            name = (ctx.params or {}).get("name")
            if isinstance(name, str) and name not in [prompt.name for prompt in await server.list_prompts()]:
                raise MCPError(INVALID_PARAMS, f"Unknown prompt: {name[:200]!r}. prompts/list has those there are.")
        try:
            result = await call_next(ctx)
        except MCPError as error:
            unknown = ctx.method == "resources/read" and error.error.code == INVALID_PARAMS and error.error.data
            if unknown and ctx.protocol_version in HANDSHAKE_PROTOCOL_VERSIONS:
                raise MCPError(RESOURCE_NOT_FOUND, error.error.message, error.error.data) from error
            raise
        if ctx.method in ("initialize", "server/discover") and isinstance(result, dict):
            there = {
                "prompts": await server.list_prompts(),
                "resources": [*await server.list_resources(), *await server.list_resource_templates()],
            }
            result["capabilities"] = {
                name: value for name, value in result["capabilities"].items() if there.get(name, True)
            }
        return result

    return handle
