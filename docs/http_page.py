"""Makes `http-api.md` from the OpenAPI document: what each operation takes and answers, by API."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_mcp.hosting.faces import APIS, document

EXAMPLE = Path(__file__).parent / "http_sessions.sh"
BEGIN = """# HTTP APIs

Made from the code by `docs/made.py`.

`mlx-mcp serve --http` answers programs over plain HTTP, beside the tools at `/mcp`. `GET /openapi.json` has what
this page shows as an OpenAPI 3.1 document, for makers of clients and for tests. [guide.md](guide.md), "Serving over
HTTP", has addresses, tokens and browsers; [openai.md](openai.md) shows OpenAI's API by example;
[tools.md](tools.md) has the operations on sessions as tools.

- **Token.** Where one is set it comes as `Authorization: Bearer …`, or as `x-api-key: …`.
- **Whose it is.** Sessions and results are the caller's that made them. Another caller's handle and a missing one
  get the same answer, 404.
- **Leaving.** A client that closes its connection frees what its call holds before the engine's next step. A call
  with an `Idempotency-Key` goes on, since its repeat will ask for the answer.
- **Repeats.** The same call with the same `Idempotency-Key` is done once. A repeat gets the first answer, also while
  the first call runs, and in the way that it asks for (`stream`, `wait_s`). A key is a caller's own, and it is kept
  with the result: for an hour (`MLX_MCP_RESULT_TTL_S`), the 256 latest results of each caller. A call that failed
  has changed nothing, and its key is free again.
- **Long calls.** With `wait_s` a call is answered by then. If it still runs, the status is 202, and `GET
  /v1/results/{id}` waits for its result.
- **Streams.** Server-sent events: `event` names the kind, `data` is JSON. A comment comes every 15 s where there is
  nothing to say. An error before the first event has a status of its own, a later one is the last event.
- **Errors.** Those of sessions are problem details (RFC 9457, `application/problem+json`): `detail` says what to do,
  `code` is a word for programs. OpenAI's and Anthropic's APIs have errors in their own forms.

## Sessions by curl

A context is computed once, forked, asked in turns and in a batch. The lines after an arrow are a part of each
answer.

"""


def http_page() -> str:
    """The page."""
    made = document()
    parts = [BEGIN, f"```sh\n{EXAMPLE.read_text()}```\n"]
    for api in APIS:
        parts.append(f"\n## {api.name}\n")
        for path, methods in made["paths"].items():
            for method, operation in methods.items():
                if operation["tags"][0] == api.name:
                    parts.append(operation_section(method.upper(), path, operation))
    parts += ["\n## Errors\n\n| status | when | shape |\n|---|---|---|\n", *errors(made)]
    parts.append("\n## Shapes\n\nWhat is not there is left out of an answer. Members that must be sent are in bold.\n")
    parts += [shape_section(name, schema) for name, schema in sorted(made["components"]["schemas"].items())]
    return "".join(parts)


def operation_section(method: str, path: str, operation: dict[str, Any]) -> str:
    """What is said of one operation."""
    rows = [
        f"| `{each['name']}` | {each['in']} | {kind(each['schema'])} | {cell(each.get('description', ''))} |\n"
        for each in operation["parameters"]
    ]
    taken = operation.get("requestBody", {}).get("content", {}).get("application/json")
    lines = [f"\n### {method} {path}\n\n{operation['summary']}\n"]
    if rows:
        lines += ["\n| parameter | in | type | |\n|---|---|---|---|\n", *rows]
    lines.append(f"\nTakes {kind(taken['schema'])}. " if taken else "\n")
    return "".join([*lines, "Answers ", ", ".join(answers(operation)), ".\n"])


def answers(operation: dict[str, Any]) -> Iterator[str]:
    """What a call that goes well is answered with, by status."""
    for status, response in operation["responses"].items():
        if int(status) < 400:
            for media_type, content in response["content"].items():
                if media_type == "text/event-stream":
                    data = content["schema"]["properties"]["data"]
                    schema = data.get("anyOf", [data])[-1]["contentSchema"]
                    yield f"or as a stream of {kind(schema['anyOf'][0] if 'anyOf' in schema else schema)}"
                else:
                    yield f"{status} with {kind(content['schema'])}"


def errors(made: dict[str, Any]) -> Iterator[str]:
    """The rows of a table of all errors: an API has those whose shape is its own, and all have those that are texts."""
    found: dict[str, tuple[str, set[str]]] = {}
    for methods in made["paths"].values():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    _, shapes = found.setdefault(status, (response["description"], set()))
                    for media_type, content in response["content"].items():
                        shapes.add("a text" if media_type == "text/plain" else kind(content["schema"]))
    for status, (about, shapes) in sorted(found.items()):
        yield f"| {status} | {about} | {', '.join(sorted(shapes))} |\n"


def shape_section(name: str, schema: dict[str, Any]) -> str:
    """What is said of one shape."""
    about = f"{cell(schema['description'])}\n" if "description" in schema else ""
    properties, required = schema.get("properties", {}), schema.get("required", ())
    head = f"\n### {name} {{ #{anchor(name)} }}\n\n{about}"
    if not properties:
        return f"{head}\nIs {kind({key: value for key, value in schema.items() if key != 'description'})}.\n"
    rows = []
    for each, said in properties.items():
        shown = f"**`{each}`**" if each in required else f"`{each}`"
        rows.append(f"| {shown} | {kind(said)} | {cell(said.get('description', ''))} |\n")
    return "".join([head, "\n| member | type | |\n|---|---|---|\n", *rows])


def kind(schema: dict[str, Any]) -> str:
    """The type of a value, in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{anchor(name)})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = (kind(each) for each in schema[several] if each.get("type") != "null")
            return " or ".join(dict.fromkeys(kinds)) or "null"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    name = str(schema.get("type", "any"))
    if name == "array" and "items" in schema:
        return f"list of {kind(schema['items'])}"
    return f"{name}{bounds(schema)}"


def bounds(schema: dict[str, Any]) -> str:
    """What limits a number."""
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [f"{sign} {schema[word]}" for word, sign in words.items() if word in schema]
    return f" ({', '.join(said)})" if said else ""


def anchor(name: str) -> str:
    """Where on the page a shape is."""
    return "shape-" + re.sub(r"\W+", "-", name).lower()


def cell(text: str) -> str:
    """A text as it may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")
