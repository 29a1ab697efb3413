"""A span for each MCP request, in place of the SDK's own, which has names and messages that callers wrote."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mcp import MCPError
from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext
from mcp_types import CallToolResult

from mlx_mcp.service.service import Service
from mlx_mcp.service.tracing import RequestTrace, parent_of, request_span, trace_generations

METHODS = frozenset(
    "initialize ping tools/call tools/list prompts/get prompts/list resources/list resources/read "
    "resources/templates/list resources/subscribe resources/unsubscribe completion/complete logging/setLevel "
    "server/discover subscriptions/listen tasks/get tasks/result tasks/list tasks/cancel".split()
)
OTHER = "other"
SDKS_OWN = "OpenTelemetryMiddleware"


def trace_requests(middleware: list[ServerMiddleware[Any]], service: Service, tools: Collection[str]) -> None:
    """Have a server's requests traced by this; `tools` are the names of those that it has."""
    trace_generations(service)
    middleware[:] = [traced(tools), *(each for each in middleware if type(each).__name__ != SDKS_OWN)]


def traced(tools: Collection[str]) -> ServerMiddleware[Any]:
    """Makes the span of each request; its parent is `traceparent` in `_meta`, or the HTTP request's span."""

    async def handle(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        method = ctx.method if ctx.method in METHODS else OTHER
        named = (ctx.params or {}).get("name") if method == "tools/call" else None
        tool = (named if isinstance(named, str) and named in tools else OTHER) if named is not None else ""
        meta: Any = ctx.meta
        over_http = getattr(ctx.request, "scope", {}).get("mlx_mcp.trace")
        parent = parent_of(meta) or (over_http.context if isinstance(over_http, RequestTrace) else None)
        with request_span(f"{method} {tool}".strip(), parent) as span:
            if span is not None:
                span.name(f"{method} {tool}".strip(), mcp__method__name=method)
                if tool:
                    span.span.set_attributes({"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": tool})
            try:
                result = await call_next(ctx)
            except MCPError as error:
                if span is not None:
                    span.note_error(str(error.error.code))
                raise
            except Exception as error:  # of any kind: the span says which, and it is raised again
                if span is not None:
                    span.note_error(type(error).__name__)
                raise
            if span is not None and isinstance(result, CallToolResult) and result.is_error:
                span.note_error("tool_error")
            return result

    return handle
