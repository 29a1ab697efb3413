"""The tools about models."""

from __future__ import annotations

from typing import Annotated

from mcp.server.mcpserver import Context as ToolContext
from mcp_types import CallToolResult

from mlx_mcp.api.mcp.arguments import Arguments
from mlx_mcp.api.mcp.calls import ToolSet, translated
from mlx_mcp.api.mcp.results import ModelList, reply
from mlx_mcp.api.mcp.translate import model_list
from mlx_mcp.service.models import list_models


class ModelTools(ToolSet):
    """Tools about models."""

    @translated
    async def list_models(self, given: Arguments, ctx: ToolContext) -> Annotated[CallToolResult, ModelList]:
        """List the models that can be used: name, size, context length, sampling defaults, and which are loaded.

        The one with `default` answers when no model is named; one that is not loaded takes longer at its first call.
        """
        return reply(model_list(await list_models(self._service)))
