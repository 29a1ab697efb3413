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
from mlx_mcp.api.openai.shared_shapes import ErrorAnswer
from mlx_mcp.api.openai.stored_responses import cancel_response, delete_response, show_input_items, show_response
from mlx_mcp.api.web.endpoint import Api, Endpoint

MODEL = {"model": "Name or alias of the model, with its slashes as they are."}
RESPONSE = {"response_id": "Id of a stored response."}
DONE = "[DONE]"  # the data of a stream's last event
ONE = "/v1/responses/{response_id}"
ENDPOINTS = (
    Endpoint("GET", "/v1/models", show_models, "The models that can be asked for", gives=ModelPage),
    Endpoint(
        "GET", "/v1/models/{model:path}", show_model, "One model, by name or alias", gives=ModelInfo, path_words=MODEL
    ),
    Endpoint(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        "Answer a chat",
        ChatRequest,
        ChatCompletion,
        ChatChunk,
        last_data=DONE,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        completions,
        "Go on with a text",
        CompletionRequest,
        Completion,
        Completion,
        last_data=DONE,
    ),
    Endpoint(
        "POST", "/v1/responses", create_response, "Answer an input", ResponseRequest, ResponseAnswer, ResponseEvent
    ),
    Endpoint("GET", ONE, show_response, "A stored response", gives=ResponseAnswer, path_words=RESPONSE),
    Endpoint(
        "DELETE",
        ONE,
        delete_response,
        "Forget a stored response, and close its session",
        gives=Deleted,
        path_words=RESPONSE,
    ),
    Endpoint(
        "POST", f"{ONE}/cancel", cancel_response, "End one in the background", gives=ResponseAnswer, path_words=RESPONSE
    ),
    Endpoint(
        "GET",
        f"{ONE}/input_items",
        show_input_items,
        "What was new in its request",
        gives=InputItems,
        path_words=RESPONSE,
    ),
    Endpoint("POST", "/v1/embeddings", refuse_embeddings, "Refused: no model makes embeddings", EmbeddingRequest),
)
OPENAI = Api("OpenAI", ENDPOINTS, refuse, ErrorAnswer)
