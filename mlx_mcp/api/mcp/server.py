"""Builds the MCP server: who it is, and what it offers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mcp import MCPError
from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import INVALID_PARAMS, CallToolResult, InputRequiredResult, Resource
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

from mlx_mcp import __version__
from mlx_mcp.api.mcp.changes import Changes
from mlx_mcp.api.mcp.completions import add_completions
from mlx_mcp.api.mcp.icon import ICONS
from mlx_mcp.api.mcp.prompts import add_prompts
from mlx_mcp.api.mcp.resources import add_resources, session_resources
from mlx_mcp.api.mcp.sandbox_resources import add_sandbox_resources
from mlx_mcp.api.mcp.tasks import Tasks
from mlx_mcp.api.mcp.tools import make_tools
from mlx_mcp.api.mcp.traced import trace_requests
from mlx_mcp.errors import nearest
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, no_runtime

RESOURCE_NOT_FOUND = -32002  # up to 2025-11-25; later versions have INVALID_PARAMS for it (SEP-2164)
WEBSITE = "https://github.com/mlx-mcp/mlx-mcp"
INSTRUCTIONS = """\
Language models on this machine; nothing leaves it. They are smaller than you are: give them work that is plain, long \
or many, such as summaries, extraction, classification, drafts and first looks, and check what comes back. A prompt \
must stand alone: the model sees nothing of your conversation. Name `files` instead of pasting them.

- One answer: `generate`. Independent ones: several calls in one turn, or `generate_batch`. Data: `json_schema`, then \
the answer parses.
- Many calls over one context: `create_session` computes it once. Then ask many things of it with `generate_batch`, \
or give each sub-agent a fork of its own (`fork_session` copies nothing). In a session send only what is new; with \
keep=false it stays as it was.
- Long work: a call that takes longer than `wait_s` answers with a `result_id`; fetch the rest with `get_result`.
- To be needed another day: `persist_session`. Not needed any more: `close_session`.
- Input that is too large for you (logs, a repository, hundreds of texts to label): `sandbox_run` runs your Python \
beside the model, and only what it prints comes back.
- `list_models` says which models there are, `list_sessions` what is held; the resources mlx://sessions/… show what \
was said. The first call to a model loads it, which can take minutes; progress is reported.
"""


class Server(MCPServer[Any]):
    """An MCP server whose list of resources has the sessions that there are, and which knows which tool was meant."""

    service: Service

    async def list_resources(self) -> list[Resource]:
        """The resources that are always there, and the transcripts of the caller's sessions."""
        return [*await super().list_resources(), *session_resources(self.service)]

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Call a tool by its name.

        Raises:
            ToolError: there is none of that name, with the one that was probably meant; or the tool failed.
        """
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError:
            names = [tool.name for tool in await self.list_tools()]
            if name in names:
                raise
        near = nearest(name[:200], names)
        meant = f" Did you mean {near!r}?" if near else ""
        raise ToolError(f"There is no tool {name[:200]!r}.{meant} Call one of {', '.join(names)}.")


def build_server(
    service: Service,
    files: FileReader | None = None,
    activity: Activity | None = None,
    wait_s: float | None = None,
    stale: Collection[str] = (),
    sandboxes: Sandboxes | None = None,
    **settings: Any,
) -> MCPServer[Any]:
    """An MCP server on a service; many servers (one per connection) may share an engine.

    Callers can have `files` read, none if there is no reader; what they do is noted in `activity`. `wait_s` is how long
    a call is waited for before it is answered with a handle; None leaves that to the host's name. `stale` are the lists
    of which the client may have been told something else before, and `sandboxes` those of the process. `settings` go to
    MCPServer as they are; see its own documentation.
    """
    sandboxes = Sandboxes(no_runtime) if sandboxes is None else sandboxes
    changes, tools = Changes(service, stale), make_tools(service, files, activity, wait_s, sandboxes)
    for tool in tools:
        tool.icons = ICONS
    server = Server(
        "mlx-mcp",
        title="mlx-mcp: local MLX models",
        description="Runs language models on this machine, for many agents at once.",
        instructions=INSTRUCTIONS,
        website_url=WEBSITE,
        icons=ICONS,
        version=__version__,
        tools=tools,
        extensions=[Tasks(service.jobs)],
        subscriptions=changes.bus,
        lifespan=changes.lifespan,
        log_level="WARNING",
        **settings,
    )
    server.service = service
    add_resources(server, service)
    add_sandbox_resources(server, service, sandboxes)
    add_prompts(server)
    add_completions(server, service)
    changes.install(server)
    server.middleware.append(as_specified(server))
    trace_requests(server.middleware, service, {tool.name for tool in tools})
    return server


def as_specified(server: MCPServer[Any]) -> ServerMiddleware[Any]:
    """Has a server give unknown prompts and resources the specified codes.

    The SDK answers to an unknown prompt, and to one without an argument that it requires, as to a fault of its own,
    with a traceback in the log; and to an unknown resource with the code of the newest protocol version in all of them.
    """

    async def handle(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.method == "prompts/get":
            check_prompt(ctx.params or {}, {prompt.name: prompt for prompt in await server.list_prompts()})
        try:
            return await call_next(ctx)
        except MCPError as error:
            unknown = ctx.method in READS and error.error.code == INVALID_PARAMS and error.error.data
            if unknown and ctx.protocol_version in HANDSHAKE_PROTOCOL_VERSIONS:
                raise MCPError(RESOURCE_NOT_FOUND, error.error.message, error.error.data) from error
            raise

    return handle


READS = ("resources/read", "resources/subscribe")


def check_prompt(params: Any, prompts: dict[str, Any]) -> None:
    """Check what a prompt is asked for with.

    Raises:
        MCPError: there is no such prompt, or an argument that it requires is missing.
    """
    name = params.get("name")
    if not isinstance(name, str):
        return  # which the SDK refuses
    if name not in prompts:
        raise MCPError(INVALID_PARAMS, f"Unknown prompt: {name[:200]!r}. prompts/list has those there are.")
    given = params.get("arguments") or {}
    missing = [argument.name for argument in prompts[name].arguments or () if argument.required]
    missing = [argument for argument in missing if argument not in given]
    if missing:
        raise MCPError(INVALID_PARAMS, f"The prompt {name} needs {', '.join(missing)}: give it, and ask again.")
