"""How an answer shall be: what chat completions and responses have alike. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_mcp.api.openai.shared_shapes import Effort, Json, SamplingTaken, TokenSampling
from mlx_mcp.chat.prompt import AUTO, NONE, REQUIRED, Grammar, GrammarKind, Reasoning
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.values import Sampling

EFFORTS: dict[str, Reasoning] = {
    "none": Reasoning.OFF,
    "minimal": Reasoning.LOW,
    "low": Reasoning.LOW,
    "medium": Reasoning.MEDIUM,
    "high": Reasoning.HIGH,
    "xhigh": Reasoning.HIGH,
}
# What stands for no limit: it is lowered to what the context leaves.
UNLIMITED_TOKENS = 1 << 24
ANY_OBJECT: Json = {"type": "object"}


def reasoning_of(effort: Effort | None) -> Reasoning | None:
    """How long the model is asked to think; None leaves it to the model."""
    return None if effort is None else EFFORTS[effort]


def function_of(tool: Json, nested: bool) -> dict[str, Any]:
    """A tool as the service has it: a function definition in the form of chat completions.

    `nested` says that the function's members are in an object of their own, as in chat completions; in responses they
    are beside the type.

    Raises:
        InvalidRequest: it is no function.
    """
    if tool.get("type", "function") != "function":
        raise InvalidRequest(
            f"A tool is of type {str(tool.get('type'))[:40]!r}, which this server does not run. Give it as a function "
            "of your own, and answer its calls."
        )
    function = tool.get("function") if nested else {key: value for key, value in tool.items() if key != "type"}
    if isinstance(function, dict):
        function = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": function}


def functions_of(tools: Sequence[Json]) -> tuple[dict[str, Any], ...]:
    """The tools of a response as the service has them; those in a namespace are functions like the others.

    Raises:
        InvalidRequest: one of them is no function.
    """
    return tuple(function_of(tool, nested=False) for _, tool in with_namespaces(tools))


def namespaces_of(tools: Sequence[Json]) -> dict[str, str]:
    """The namespaces of functions, by the functions' names."""
    return {str(tool.get("name")): namespace for namespace, tool in with_namespaces(tools) if namespace}


def with_namespaces(tools: Sequence[Json]) -> Iterator[tuple[str, Json]]:
    """Each tool with the namespace that it is in, which is empty for most."""
    for tool in tools:
        match tool:
            case {"type": "namespace", "name": str(name), "tools": list(inner)}:
                yield from ((name, each) for each in inner if isinstance(each, dict))
            case _:
                yield "", tool


def choice_of(given: str | Json) -> str:
    """Which tool the model shall call: auto, none, required, or a function's name.

    Raises:
        InvalidRequest: it is none of these.
    """
    match given:
        case "auto" | "none" | "required":
            return {"auto": AUTO, "none": NONE, "required": REQUIRED}[str(given)]
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)} if name:
            return name
    raise InvalidRequest(
        '`tool_choice` must be "auto", "none", "required", or one function: {"type": "function", "function": {"name": '
        "…}}. For a choice among some, offer only these."
    )


def grammar_of(form: Json, nested: bool) -> Grammar | None:
    """What the answer is held to; None for text.

    `nested` says that a schema is in an object of its own, as in chat completions.

    Raises:
        InvalidRequest: it is no form of an answer, or has no schema.
    """
    kind = form.get("type", "text")
    if kind == "text":
        return None
    schema: Any = ANY_OBJECT
    if kind == "json_schema":
        described = form.get("json_schema") if nested else form
        schema = described.get("schema") if isinstance(described, dict) else None
    elif kind != "json_object":
        raise InvalidRequest(
            f"An answer of type {str(kind)[:40]!r} cannot be asked for. Give text, json_object or json_schema."
        )
    if not isinstance(schema, dict):
        raise InvalidRequest(
            "A form of type json_schema has no schema: write it as its member `schema`, in chat completions as "
            "`json_schema.schema`."
        )
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def sampling_of(taken: SamplingTaken, max_tokens: int | None, logprobs: int | None = None) -> Sampling:
    """How an answer is drawn. Without `max_tokens` it may take all of the context, as OpenAI has it."""
    more: dict[str, Any] = {}
    if isinstance(taken, TokenSampling):
        more = {
            "presence_penalty": taken.presence_penalty,
            "frequency_penalty": taken.frequency_penalty,
            "logit_bias": tuple(taken.logit_bias.items()),
            "seed": None if taken.seed is None else taken.seed % 2**32,
            "stop": (taken.stop,) if isinstance(taken.stop, str) else tuple(taken.stop),
        }
    return Sampling(
        max_tokens=UNLIMITED_TOKENS if max_tokens is None else max_tokens,
        temperature=taken.temperature,
        top_p=taken.top_p,
        top_k=taken.top_k,
        min_p=taken.min_p,
        repetition_penalty=taken.repetition_penalty,
        logprobs=logprobs,
        **more,
    )
