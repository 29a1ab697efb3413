"""The OpenAPI document is valid, and says all of every endpoint."""

import json

import httpx2
from openapi_spec_validator import validate
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from mlx_mcp import __version__
from mlx_mcp.api.web.endpoint import Api, Endpoint
from mlx_mcp.api.web.openapi import openapi, renamed, short
from mlx_mcp.hosting.faces import APIS, document
from tests.api.http.routes import serving_all
from tests.fakes import fake_client


def test_the_document_of_all_apis_is_valid():
    validate(document())
    assert document()["info"]["version"] == __version__


def test_every_endpoint_is_in_the_document_with_its_parameters_described():
    shown = {
        (path.count("{"), method, path.split("{")[0]): each
        for path, methods in document()["paths"].items()
        for method, each in methods.items()
    }
    for api in APIS:
        for endpoint in api.endpoints:
            found = shown[endpoint.path.count("{"), endpoint.method.lower(), endpoint.path.split("{")[0]]
            assert api.name in found["tags"]
            assert endpoint.when in [each["name"] for each in found["parameters"]] or not endpoint.when
    for each in shown.values():
        assert all(parameter["description"] for parameter in each["parameters"]), each["operationId"]
    assert len({each["operationId"] for each in shown.values()}) == len(shown)


async def test_the_server_gives_the_document_to_who_may_call_it():
    engine = fake_client()
    async with serving_all(engine, APIS) as address, httpx2.AsyncClient() as http:
        assert (await http.get(f"{address}/openapi.json")).json() == json.loads(json.dumps(document()))
    engine.close()


class Question(BaseModel):
    text: str


class Answer(BaseModel):
    text: str
    note: str | None = None


class Piece(BaseModel):
    piece: str


class Wrong(BaseModel):
    wrong: str


class Where(BaseModel):
    limit: int = Field(10, ge=1, description="How many.")


class Head(BaseModel):
    key: str = Field("k", alias="X-Key", description="A key.")


async def handle(asked):
    raise AssertionError("nobody calls it")


def refuse(failure):
    return JSONResponse({"wrong": failure.message}, 529 if failure.status == 503 else failure.status, failure.headers)


PLAIN = Endpoint("GET", "/things/{thing:path}", handle, "Show a thing.", gives=Answer, path_words={"thing": "Which."})
FULL = Endpoint(
    "POST",
    "/things",
    handle,
    "Ask.",
    Question,
    Answer,
    Piece,
    201,
    "[DONE]",
    query=Where,
    headers=Head,
    also={202: Piece},
)
WHEN = Endpoint("GET", "/things/{id}", handle, "Show it otherwise.", gives=Piece, when="x-other")


def test_an_operation_says_what_its_endpoint_takes_and_answers():
    made = openapi([Api("Things", (PLAIN, FULL), refuse, Wrong)], "1.0")
    validate(made)
    show, ask = made["paths"]["/things/{thing}"]["get"], made["paths"]["/things"]["post"]
    assert [(each["name"], each["in"], each["description"]) for each in show["parameters"]] == [
        ("thing", "path", "Which.")
    ]
    assert "requestBody" not in show
    assert [(each["name"], each["in"], each["required"]) for each in ask["parameters"]] == [
        ("limit", "query", False),
        ("X-Key", "header", False),
    ]
    assert ask["requestBody"] == {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Question"}}},
    }
    answers = ask["responses"]
    assert answers["201"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Answer"}
    assert answers["202"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Piece"}
    last, data = answers["201"]["content"]["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
    assert last == {"const": "[DONE]"}
    assert data["contentSchema"]["anyOf"] == [{"$ref": f"#/components/schemas/{name}"} for name in ("Piece", "Wrong")]


def test_errors_have_the_status_and_the_shape_that_the_api_gives_them():
    answers = openapi([Api("Things", (FULL,), refuse, Wrong)], "1.0")["paths"]["/things"]["post"]["responses"]
    assert "503" not in answers
    assert answers["529"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Wrong"}
    assert "Retry-After" in answers["529"]["headers"]
    assert {"400", "401", "404", "409", "413", "429", "500"} < answers.keys()
    assert list(answers["421"]["content"]) == ["text/plain"]


def test_shapes_of_one_name_are_told_apart_by_their_api():
    assert short("mlx_mcp__api__openai__chat_shapes__LikelyToken") == "openai.LikelyToken"
    assert short("Generation") == "Generation"
    names = {"a__Said": "a.Said"}
    schema = {"items": [{"$ref": "#/components/schemas/a__Said"}]}
    assert renamed(schema, names) == {"items": [{"$ref": "#/components/schemas/a.Said"}]}


def test_two_endpoints_that_differ_in_a_header_are_one_operation_that_answers_either():
    made = openapi([Api("Other", (WHEN,), refuse, Wrong), Api("Things", (PLAIN,), refuse, Wrong)], "1.0")
    validate(made)
    assert list(made["paths"]) == ["/things/{thing}"]
    show = made["paths"]["/things/{thing}"]["get"]
    assert show["tags"] == ["Things", "Other"]
    assert [(each["name"], each["in"]) for each in show["parameters"]] == [("thing", "path"), ("x-other", "header")]
    assert show["responses"]["200"]["content"]["application/json"]["schema"] == {
        "anyOf": [{"$ref": "#/components/schemas/Answer"}, {"$ref": "#/components/schemas/Piece"}]
    }
