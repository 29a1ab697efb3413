"""The OpenAPI document of all APIs, made from their endpoints."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from mlx_mcp.api.web.endpoint import Api, Endpoint
from mlx_mcp.api.web.failure import STATUSES, Failure
from mlx_mcp.errors import CapacityError

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
REF = "#/components/schemas/{model}"
SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
# Beside those of the errors in failure.py: no token, a body that is too long, too many calls, a fault of the server's.
FURTHER = {401, 413, 429, 500}
WORDS = {
    400: "The call cannot be carried out as it stands.",
    401: "The call has no token that is known here.",
    403: "Pages of this origin may not call the server.",
    404: "What the call names is not there, or is another caller's.",
    408: "The request did not arrive in time.",
    409: "What the call names is busy.",
    413: "The body is too long.",
    421: "The host that the request is for is not known to be this server.",
    429: "The caller asks for more than it may. The header Retry-After says when to try again.",
    500: "The call failed by a fault of the server.",
    503: "The server has no room for the call now, or cannot serve it. The header Retry-After says when to try again.",
    529: "The server has no room for the call now. The header Retry-After says when to try again.",
}
# What is answered as plain text before an API sees the call. Some paths lead nowhere, such as those with a line break.
AT_THE_GATE = (403, 404, 408, 421)
RETRY_AFTER = {"description": "Seconds after which the same call may succeed.", "schema": {"type": "integer"}}
Way = tuple[Api, Endpoint]


class Untitled(GenerateJsonSchema):
    """Schemas whose fields have no titles, which would repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """None."""
        return False


def openapi(apis: Sequence[Api], version: str) -> dict[str, Any]:
    """The document: OpenAPI 3.1."""
    refs, components = shapes_of(apis)
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for (path, method), ways in sorted_ways(apis).items():
        paths[path][method.lower()] = operation(path, ways, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-mcp",
            "version": version,
            "description": "Local MLX language models over HTTP. Tools for agent hosts are served at /mcp, by MCP.",
        },
        "tags": [{"name": api.name} for api in apis],
        "paths": dict(paths),
        "components": {"schemas": components, "securitySchemes": SECURITY},
        # A server that only its own machine can reach may be without a token.
        "security": [{"bearer": []}, {"key": []}, {}],
    }


def sorted_ways(apis: Sequence[Api]) -> dict[tuple[str, str], list[Way]]:
    """The endpoints by path and method. Several that differ in a header are one operation, which has one path.

    The parameters of the paths may have other names in each; the document has those of the one without a header.
    """
    ways: dict[tuple[str, str], list[Way]] = defaultdict(list)
    every = [(api, each) for api in apis for each in api.endpoints]
    for api, endpoint in sorted(every, key=lambda way: way[1].when):
        shape = re.sub(r"\{\w+(:\w+)?\}", "{}", endpoint.path)
        ways[shape, endpoint.method].append((api, endpoint))
    return {(plain(each[0][1].path), method): each for (_, method), each in ways.items()}


def plain(path: str) -> str:
    """A path without what its parameters match."""
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", path)


def shapes_of(apis: Sequence[Api]) -> tuple[dict[type[BaseModel], dict[str, Any]], dict[str, Any]]:
    """References to all shapes, and their schemas by name."""
    shapes = {shape: None for api in apis for shape in (api.error, *every_shape(api))}
    made, schemas = models_json_schema(
        [(shape, "validation") for shape in shapes], ref_template=REF, schema_generator=Untitled
    )
    names = {name: short(name) for name in schemas.get("$defs", {})}
    refs = {shape: renamed(made[shape, "validation"], names) for shape in shapes}
    return refs, {names[name]: renamed(schema, names) for name, schema in schemas.get("$defs", {}).items()}


def short(name: str) -> str:
    """The name of a shape: of two with one name pydantic gives the whole module, of which the API is enough."""
    return re.sub(r"^mlx_mcp__api__(\w+?)__.*__(\w+)$", r"\1.\2", name)


def renamed(schema: Any, names: dict[str, str]) -> Any:
    """A schema with references to shapes by their new names."""
    if isinstance(schema, list):
        return [renamed(each, names) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: REF.format(model=names[each.rpartition("/")[2]]) if key == "$ref" else renamed(each, names)
        for key, each in schema.items()
    }


def every_shape(api: Api) -> Iterator[type[BaseModel]]:
    """The bodies, answers and events of an API."""
    for each in api.endpoints:
        yield from filter(None, (each.takes, each.gives, each.events, *each.also.values()))


def operation(path: str, ways: list[Way], refs: dict[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    """What one method does at a path."""
    (_, first), *others = ways
    name = re.sub(r"\W+", "_", f"{first.method.lower()}{path}").strip("_")
    made: dict[str, Any] = {
        "operationId": name,
        "tags": [api.name for api, _ in ways],
        "summary": first.summary,
        "parameters": [*path_parameters(path, first), *parameters(first)],
        "responses": responses(ways, refs),
    }
    for other, endpoint in others:
        said = f"With this header the operation is that of {other.name}: {endpoint.summary}"
        header = {"name": endpoint.when, "in": "header", "description": said, "schema": {"type": "string"}}
        made["parameters"].append(header)
    taken = [refs[each.takes] for _, each in ways if each.takes is not None]
    if taken:
        needed = all(each.needs_body for _, each in ways)
        made["requestBody"] = {"required": needed, "content": {JSON: {"schema": one_of(taken)}}}
    return made


def path_parameters(path: str, endpoint: Endpoint) -> list[dict[str, Any]]:
    """The parts in braces of a path."""
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
            **({"description": endpoint.path_words[name]} if name in endpoint.path_words else {}),
        }
        for name in re.findall(r"\{(\w+)\}", path)
    ]


def parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    """What a query or headers may say."""
    made = []
    for place, shape in (("query", endpoint.query), ("header", endpoint.headers)):
        schema = shape.model_json_schema(schema_generator=Untitled) if shape is not None else {}
        required = schema.get("required", ())
        for name, each in schema.get("properties", {}).items():
            about = {"description": each.pop("description")} if "description" in each else {}
            made.append({"name": name, "in": place, "required": name in required, **about, "schema": each})
    return made


def responses(ways: list[Way], refs: dict[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    """What an operation answers: shapes and streams, and every error."""
    found: dict[int, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    with_retry = set[int]()
    for api, endpoint in ways:
        for status, shape in {endpoint.status: endpoint.gives, **endpoint.also}.items():
            if shape is not None:
                found[status][JSON].append(refs[shape])
        if endpoint.events is not None:
            data = one_of([refs[endpoint.events], refs[api.error]])
            found[endpoint.status][EVENTS].append(event_schema(data, endpoint.last_data))
        for failure in failures():
            refusal = api.refuse(failure)
            found[refusal.status_code][refusal.headers["content-type"].partition(";")[0]].append(refs[api.error])
            if "retry-after" in refusal.headers:
                with_retry.add(refusal.status_code)
    for status in AT_THE_GATE:
        found[status][TEXT].append({"type": "string"})
    return {
        str(status): {
            "description": WORDS.get(status, "The answer."),
            **({"headers": {"Retry-After": RETRY_AFTER}} if status in with_retry else {}),
            "content": {media_type: {"schema": one_of(schemas)} for media_type, schemas in contents.items()},
        }
        for status, contents in sorted(found.items())
    }


def failures() -> Iterator[Failure]:
    """One of each kind that an API may have a status of its own for."""
    for kind, status in STATUSES:
        yield Failure(status, "", 1.0 if issubclass(kind, CapacityError) else None, error=kind.__new__(kind))
    for status in sorted(FURTHER):
        yield Failure(status, "", 1.0 if status == 429 else None)


def event_schema(shape: dict[str, Any], last: str) -> dict[str, Any]:
    """Each event of a stream, as OpenAPI 3.2 describes them, and the shape of the JSON in its data.

    An error that comes when the stream has begun is the data of its last event.
    """
    data: dict[str, Any] = {"type": "string", "contentMediaType": JSON, "contentSchema": shape}
    return {
        "type": "object",
        "description": "One of the server-sent events.",
        "properties": {"event": {"type": "string"}, "data": {"anyOf": [{"const": last}, data]} if last else data},
        "required": ["data"],
    }


def one_of(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The schema of what is one of these."""
    different = [each for i, each in enumerate(schemas) if each not in schemas[:i]]
    return different[0] if len(different) == 1 else {"anyOf": different}
