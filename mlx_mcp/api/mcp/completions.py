"""Completions: names of models and sessions, where an argument of a prompt or of a resource's address takes one."""

from __future__ import annotations

from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp_types import Completion, CompletionArgument, CompletionContext, PromptReference, ResourceTemplateReference

from mlx_mcp.api.mcp.calls import tenant
from mlx_mcp.api.mcp.resources import SESSION
from mlx_mcp.service.models import list_models
from mlx_mcp.service.service import Service, known_sessions

MAX_VALUES = 100  # as the protocol has it


def add_completions(server: MCPServer[Any], service: Service) -> None:
    """Have a server complete arguments."""

    async def complete(
        ref: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        context: CompletionContext | None,
    ) -> Completion | None:
        if isinstance(ref, ResourceTemplateReference):
            found = sessions(service) if (ref.uri, argument.name) == (SESSION, "id") else []
        elif argument.name == "model":
            found = [model.entry.spec.name for model in await list_models(service)]
        else:
            found = sessions(service) if argument.name == "session" else []
        return matching(found, argument.value)

    decorate: Any = server.completion  # which has no types (mcp 2.3)
    decorate()(complete)


def sessions(service: Service) -> list[str]:
    """What the caller's sessions are called, those used last first: names, and handles of those that have none."""
    mine = [info for info in known_sessions(service).values() if info.tenant == tenant()]
    mine.sort(key=lambda info: info.used_at, reverse=True)
    return [info.name or info.session_id for info in mine]


def matching(values: list[str], typed: str) -> Completion:
    """Those values that contain what was typed, whatever the case; those that begin with it come first."""
    typed = typed.lower()
    found = [value for value in values if typed in value.lower()]
    found.sort(key=lambda value: not value.lower().startswith(typed))
    return Completion(values=found[:MAX_VALUES], total=len(found), has_more=len(found) > MAX_VALUES)
