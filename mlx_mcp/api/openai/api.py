"""OpenAI's API, as the server has it."""

from __future__ import annotations

from mlx_mcp.api.openai.chat import chat_completions
from mlx_mcp.api.openai.chat_shapes import ChatChunk, ChatCompletion, ChatRequest
from mlx_mcp.api.openai.completion_shapes import Completion, CompletionRequest
from mlx_mcp.api.openai.completions import completions
from mlx_mcp.api.openai.errors import refuse
from mlx_mcp.api.openai.model_shapes import EmbeddingRequest, ModelInfo, ModelPage
from mlx_mcp.api.openai.models import refuse_embeddings, show_model, show_models
from mlx_mcp.api.openai.response_shapes import Deleted, InputItems, ResponseAnswer, ResponseEvent, ResponseRequest
from mlx_mcp.api.openai.responses import create_response
from mlx_mcp.api.openai.stored_responses import cancel_response, delete_response, show_input_items, show_response
from mlx_mcp.api.web.endpoint import Api, Endpoint

ONE = "/v1/responses/{response_id}"
ENDPOINTS = (
    Endpoint("GET", "/v1/models", show_models, "The models that can be asked for", gives=ModelPage),
    Endpoint("GET", "/v1/models/{model:path}", show_model, "One model, by name or alias", gives=ModelInfo),
    Endpoint("POST", "/v1/chat/completions", chat_completions, "Answer a chat", ChatRequest, ChatCompletion, ChatChunk),
    Endpoint("POST", "/v1/completions", completions, "Go on with a text", CompletionRequest, Completion, Completion),
    Endpoint(
        "POST", "/v1/responses", create_response, "Answer an input", ResponseRequest, ResponseAnswer, ResponseEvent
    ),
    Endpoint("GET", ONE, show_response, "A stored response", gives=ResponseAnswer),
    Endpoint("DELETE", ONE, delete_response, "Forget a stored response, and close its session", gives=Deleted),
    Endpoint("POST", f"{ONE}/cancel", cancel_response, "End one in the background", gives=ResponseAnswer),
    Endpoint("GET", f"{ONE}/input_items", show_input_items, "What was new in its request", gives=InputItems),
    Endpoint("POST", "/v1/embeddings", refuse_embeddings, "Refused: no model makes embeddings", EmbeddingRequest),
)
OPENAI = Api("openai", ENDPOINTS, refuse)
