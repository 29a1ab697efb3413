"""What is told of models, and what is asked of those that make embeddings."""

from __future__ import annotations

from typing import Any, Literal

from mlx_mcp.api.openai.shape import Given, Taken


class ModelInfo(Given):
    """A model that can be asked for. `max_model_len`, in tokens, is vLLM's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mlx-mcp"
    max_model_len: int | None = None


class ModelPage(Given):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class EmbeddingRequest(Taken):
    """The body of a request for embeddings."""

    input: Any = None
    model: str = ""
