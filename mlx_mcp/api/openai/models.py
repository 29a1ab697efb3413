"""GET /v1/models and /v1/models/{id}; and POST /v1/embeddings, which no model here can answer."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from mlx_mcp.api.openai.model_shapes import ModelInfo, ModelPage
from mlx_mcp.api.openai.shape import answer
from mlx_mcp.api.web.endpoint import Asked
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.models import Model, list_models


async def show_models(asked: Asked) -> Response:
    """List the models that can be asked for, the default one first."""
    return answer(ModelPage(data=list(map(info_of, await list_models(asked.service)))))


async def show_model(asked: Asked) -> Response:
    """Show one model, by its name or an alias."""
    name = asked.request.path_params["model"]
    spec = await asyncio.to_thread(asked.service.registry.resolve, name)
    entry = await asyncio.to_thread(asked.service.registry.entry, spec)
    return answer(info_of(Model(entry, loaded=False)))


def info_of(model: Model) -> ModelInfo:
    """What is told of a model. When it was made is not known."""
    made = ModelInfo(id=model.entry.spec.name, created=0)
    if model.entry.context_tokens is not None:
        made.max_model_len = model.entry.context_tokens
    return made


async def refuse_embeddings(asked: Asked) -> Response:
    """Say that there are none."""
    raise InvalidRequest(
        "No model here makes embeddings: they generate text. Ask a server that has an embedding model for them."
    )
