"""The tools about models."""

from __future__ import annotations

from typing import Annotated

from mcp.server.mcpserver import Context as ToolContext
from mcp_types import CallToolResult
from pydantic import BaseModel, Field

from mlx_mcp.api.mcp.arguments import Arguments, LongArguments
from mlx_mcp.api.mcp.calls import ToolSet
from mlx_mcp.api.mcp.results import reply
from mlx_mcp.api.web.results import ModelEntry, ModelList, UnloadedModel
from mlx_mcp.api.web.translate import model_entry, model_list, unloaded_model
from mlx_mcp.service.activity import Report
from mlx_mcp.service.models import list_models, load_model, unload_model


class LoadArguments(LongArguments):
    """Of `load_model`."""

    model: Annotated[str, Field(description="A name or alias from list_models.")]


class UnloadArguments(Arguments):
    """Of `unload_model`."""

    model: Annotated[str, Field(description="A name or alias from list_models.")]


class ModelTools(ToolSet):
    """Tools about models."""

    async def list_models(self, given: Arguments, ctx: ToolContext) -> Annotated[CallToolResult, ModelList]:
        """List the models that can be used: size, context length, what each can do, and whether it is loaded and fits.

        The one with `default` answers when no model is named; one that is not loaded takes longer at its first call.
        """
        return reply(model_list(await list_models(self._service)))

    async def load_model(self, given: LoadArguments, ctx: ToolContext) -> Annotated[CallToolResult, ModelEntry]:
        """Load a model into memory, start or warm it up, before calls need it; switch or swap to it from another.

        Calls load their model by themselves; this is for not having to wait then. Where there is not room for both,
        idle models go, and busy ones get their turn first. Returns the model as list_models has it.
        """

        async def work(report: Report) -> BaseModel:
            return model_entry(await load_model(self._service, self._caller(ctx), given.model, report))

        return await self._long(ctx, given, "load_model", work, given.model)

    async def unload_model(self, given: UnloadArguments, ctx: ToolContext) -> Annotated[CallToolResult, UnloadedModel]:
        """Unload a model, to free its memory (VRAM) for others; it is loaded again when a call needs it.

        Its sessions stay. While calls use it, it cannot be unloaded. Returns {model, freed_mb}.
        """
        return reply(unloaded_model(await unload_model(self._service, given.model)))
