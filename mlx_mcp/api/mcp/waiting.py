"""How long a call is waited for before it is answered with a handle, how long an answer may be, and who the host is.

Hosts cut calls that take longer than they allow, most of them after 60 s whatever progress says, and refuse or file
away results that are too long. The figures are those that were observed; docs/guide.md has them as a table.
"""

from __future__ import annotations

from typing import Any

from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import Context
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from mlx_mcp.service.values import called

WAIT_S = 50.0  # where nothing is known of a host: the shortest limit that was seen is 60 s
TASK_WAIT_S = 10.0  # a client that takes tasks goes on with other work meanwhile
MAX_CHARS = 60_000
# By the beginning of the name that a client gives itself, in small letters.
HOST_WAIT_S = {"claude-code": 110.0, "gemini-cli": 540.0, "visual studio code": 240.0, "goose": 240.0}
HOST_CHARS = {"claude-code": 390_000}
TASKS = "io.modelcontextprotocol/tasks"


def host_of(context: Context) -> str:
    """What the client calls itself, in small letters; nothing if it does not say."""
    params = context.request_context.session.client_params
    return "" if params is None else params.client_info.name.lower()


def name_of(context: Context) -> str:
    """What the client calls itself in its handshake, with its version; else how it came, as HTTP has it."""
    params, request = context.request_context.session.client_params, context.request_context.request
    if params is not None:
        return called(params.client_info.name, params.client_info.version)
    headers = getattr(request, "headers", {})
    return called("MCP", headers.get("user-agent", "").partition(" ")[0])


def takes_tasks(context: ServerRequestContext[Any, Any]) -> bool:
    """Whether the client says with its request that it takes a task in place of a result; in the newer era alone."""
    capabilities = context.session.client_capabilities
    declared = capabilities.extensions if capabilities else None
    return context.protocol_version in MODERN_PROTOCOL_VERSIONS and TASKS in (declared or {})


def wait_s(context: Context, asked: float | None, setting: float | None) -> float:
    """How long a call is waited for: as it asks, else as the window is set, else as its host allows."""
    if asked is not None:
        return asked
    if setting is not None:
        return setting
    return TASK_WAIT_S if takes_tasks(context.request_context) else by_host(HOST_WAIT_S, context, WAIT_S)


def max_chars(context: Context) -> int:
    """The longest result that the host passes on to its model as it is."""
    return int(by_host(HOST_CHARS, context, MAX_CHARS))


def by_host(table: dict[str, float] | dict[str, int], context: Context, otherwise: float) -> float:
    """What a table has for the host of a call."""
    host = host_of(context)
    return next((value for name, value in table.items() if host.startswith(name)), otherwise)
