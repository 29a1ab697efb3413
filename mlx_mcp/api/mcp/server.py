"""Builds the MCP server: who it is, and what it offers."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any

from mcp import MCPError
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceNotFoundError, ToolError, UnexpectedToolError
from mcp_types import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    CallToolResult,
    GetPromptResult,
    InputRequiredResult,
    Prompt,
    Resource,
)
from pydantic import AnyUrl, ValidationError

from mlx_mcp import __version__
from mlx_mcp.api.mcp.changes import Changes
from mlx_mcp.api.mcp.completions import add_completions
from mlx_mcp.api.mcp.consent import Asking
from mlx_mcp.api.mcp.icon import ICONS
from mlx_mcp.api.mcp.prompts import add_prompts
from mlx_mcp.api.mcp.resources import add_resources, session_resources, unknown_resource
from mlx_mcp.api.mcp.sandbox_resources import add_sandbox_resources
from mlx_mcp.api.mcp.strict_tool import StrictTool
from mlx_mcp.api.mcp.tasks import Tasks
from mlx_mcp.api.mcp.tools import make_tools
from mlx_mcp.api.mcp.traced import trace_requests
from mlx_mcp.errors import EngineDead, MlxMcpError, nearest
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.observing import FAULT
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, no_runtime

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
    """An MCP server on a service: sessions are among its resources, and every error says what to do next."""

    service: Service
    activity: Activity
    strict: dict[str, StrictTool]  # this package's tools, by name

    async def list_resources(self) -> list[Resource]:
        """The resources that are always there, and the transcripts of the caller's sessions."""
        return [*await super().list_resources(), *session_resources(self.service)]

    async def read_resource(
        self, uri: AnyUrl | str, context: Context[Any, Any] | None = None
    ) -> Iterable[ReadResourceContents] | InputRequiredResult:
        """Read a resource.

        Raises:
            MCPError: there is none. The SDK gives the code of the newest protocol version in all of them.
        """
        try:
            return await super().read_resource(uri, context)
        except ResourceNotFoundError as error:
            raise unknown_resource(None if context is None else context.protocol_version, str(error), uri) from error

    async def get_prompt(
        self, name: str, arguments: dict[str, Any] | None = None, context: Context[Any, Any] | None = None
    ) -> GetPromptResult | InputRequiredResult:
        """Fill in a prompt.

        Raises:
            MCPError: there is none, or an argument is missing, which the SDK takes for a fault of its own.
        """
        check_prompt(name, arguments or {}, {prompt.name: prompt for prompt in await self.list_prompts()})
        return await super().get_prompt(name, arguments, context)

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Call a tool: note it as under way, count it, and turn errors into the protocol's, here and nowhere else.

        Raises:
            ToolError: there is no such tool, its arguments are wrong, or it failed.
            MCPError: the engine has ended.
        """
        if name not in self.strict:
            await self._check_name(name)
        began, outcome = time.monotonic(), "cancelled"
        try:
            with self.activity.under_way():
                result = await super().call_tool(name, arguments, context)
            outcome = "ok"
            return result
        except Exception as error:  # of any kind: it is counted, and told
            match error.__cause__ if isinstance(error, ToolError) else error:  # the SDK wraps what a tool raises
                case Asking() as question:
                    outcome = "asks"
                    return question.result
                case MlxMcpError() as cause:
                    outcome = type(cause).__name__
                    self.service.observer.failed(cause)
                    if isinstance(cause, EngineDead):  # no other arguments could help
                        raise MCPError(INTERNAL_ERROR, str(cause)) from error
                    raise ToolError(f"Error executing tool {name}: {cause}") from error  # the SDK's words
                case ValidationError() as cause if name in self.strict and not isinstance(error, UnexpectedToolError):
                    outcome = ""  # it was not called
                    raise ToolError(self.strict[name].advice(cause)) from error
                case _:
                    outcome = FAULT
                    raise
        finally:
            if outcome and name in self.strict:
                self.service.observer.tools.add(name, outcome, seconds=time.monotonic() - began)

    async def _check_name(self, name: str) -> None:
        """See that there is a tool of that name.

        Raises:
            ToolError: there is none, with the one that was probably meant.
        """
        names = [tool.name for tool in await self.list_tools()]
        if name not in names:
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
    activity = activity or Activity()
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
        tools=list(tools),
        extensions=[Tasks(service.jobs)],
        subscriptions=changes.bus,
        lifespan=changes.lifespan,
        log_level="WARNING",
        **settings,
    )
    server.service, server.activity, server.strict = service, activity, {tool.name: tool for tool in tools}
    add_resources(server, service)
    add_sandbox_resources(server, service, sandboxes)
    add_prompts(server)
    add_completions(server, service)
    changes.install(server)
    trace_requests(server.middleware, service, server.strict)
    return server


def check_prompt(name: str, given: dict[str, Any], prompts: dict[str, Prompt]) -> None:
    """Check what a prompt is asked for with.

    Raises:
        MCPError: there is no such prompt, or an argument that it requires is missing.
    """
    if name not in prompts:
        raise MCPError(INVALID_PARAMS, f"Unknown prompt: {name[:200]!r}. prompts/list has those there are.")
    missing = [argument.name for argument in prompts[name].arguments or () if argument.required]
    missing = [argument for argument in missing if argument not in given]
    if missing:
        raise MCPError(INVALID_PARAMS, f"The prompt {name} needs {', '.join(missing)}: give it, and ask again.")
