"""OpenAI's API, as the server has it."""

from __future__ import annotations

from mlx_mcp.api.openai.chat import chat_completions
from mlx_mcp.api.openai.chat_shapes import ChatChunk, ChatCompletion, ChatRequest
from mlx_mcp.api.openai.completion_shapes import Completion, CompletionRequest
from mlx_mcp.api.openai.completions import completions
from mlx_mcp.api.openai.errors import refuse
from mlx_mcp.api.openai.model_shapes import EmbeddingRequest, ModelInfo, ModelPage
from mlx_mcp.api.openai.models import refuse_embeddings, show_model, show_models
from mlx_mcp.api.openai.response_shapes import (
    Deleted,
    InputItems,
    ItemsQuery,
    ResponseAnswer,
    ResponseEvent,
    ResponseRequest,
)
from mlx_mcp.api.openai.responses import create_response
from mlx_mcp.api.openai.shared_shapes import ErrorAnswer
from mlx_mcp.api.openai.stored_responses import cancel_response, delete_response, show_input_items, show_response
from mlx_mcp.api.web.endpoint import Api, Endpoint

DONE = "[DONE]"
ONE = "/v1/responses/{response_id}"
RESPONSE = {"response_id": "Id of a stored response."}
OPENAI = Api(
    "OpenAI",
    (
        Endpoint("GET", "/v1/models", show_models, "List the models that can be asked for.", gives=ModelPage),
        Endpoint(
            "GET",
            "/v1/models/{model:path}",
            show_model,
            "Show a model.",
            gives=ModelInfo,
            path_words={"model": "Name or alias of the model, with its slashes as they are."},
        ),
        Endpoint(
            "POST",
            "/v1/chat/completions",
            chat_completions,
            "Answer a chat.",
            ChatRequest,
            ChatCompletion,
            ChatChunk,
            last_data=DONE,
        ),
        Endpoint(
            "POST",
            "/v1/completions",
            completions,
            "Go on with a text, to which no chat template is applied.",
            CompletionRequest,
            Completion,
            Completion,
            last_data=DONE,
        ),
        Endpoint(
            "POST",
            "/v1/responses",
            create_response,
            "Answer an input; what is stored can be gone on from.",
            ResponseRequest,
            ResponseAnswer,
            ResponseEvent,
        ),
        Endpoint("GET", ONE, show_response, "Show a stored response.", gives=ResponseAnswer, path_words=RESPONSE),
        Endpoint(
            "DELETE",
            ONE,
            delete_response,
            "Forget a stored response, and close its session.",
            gives=Deleted,
            path_words=RESPONSE,
        ),
        Endpoint(
            "POST",
            f"{ONE}/cancel",
            cancel_response,
            "End a response that runs in the background.",
            gives=ResponseAnswer,
            path_words=RESPONSE,
        ),
        Endpoint(
            "GET",
            f"{ONE}/input_items",
            show_input_items,
            "List what was new in the request for a response.",
            gives=InputItems,
            query=ItemsQuery,
            path_words=RESPONSE,
        ),
        Endpoint("POST", "/v1/embeddings", refuse_embeddings, "Refused: no model makes embeddings.", EmbeddingRequest),
    ),
    refuse,
    ErrorAnswer,
)
