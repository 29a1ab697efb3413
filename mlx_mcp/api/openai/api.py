"""OpenAI's API, as the server has it."""

from __future__ import annotations

from mlx_mcp.api.openai.chat import chat_completions
from mlx_mcp.api.openai.chat_shapes import ChatChunk, ChatCompletion, ChatRequest
from mlx_mcp.api.openai.errors import refuse
from mlx_mcp.api.openai.model_shapes import EmbeddingRequest, ModelInfo, ModelPage
from mlx_mcp.api.openai.models import refuse_embeddings, show_model, show_models
from mlx_mcp.api.web.endpoint import Api, Endpoint

ENDPOINTS = (
    Endpoint("GET", "/v1/models", show_models, "The models that can be asked for", gives=ModelPage),
    Endpoint("GET", "/v1/models/{model:path}", show_model, "One model, by name or alias", gives=ModelInfo),
    Endpoint("POST", "/v1/chat/completions", chat_completions, "Answer a chat", ChatRequest, ChatCompletion, ChatChunk),
    Endpoint("POST", "/v1/embeddings", refuse_embeddings, "Refused: no model makes embeddings", EmbeddingRequest),
)
OPENAI = Api("openai", ENDPOINTS, refuse)
