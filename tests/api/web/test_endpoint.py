"""Endpoints of several APIs on one app."""

import httpx2
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.responses import JSONResponse

from mlx_mcp.api.web.endpoint import Api, Endpoint, Serving, routes_of
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service
from tests.fakes import fake_client


class Name(BaseModel):
    name: str


def api(name, path, when=""):
    async def handle(asked):
        return Name(name=name)

    def refuse(failure):
        return JSONResponse({"refused by": name}, failure.status)

    return Api(name, (Endpoint("GET", path, handle, "", gives=Name, when=when),), refuse, Name)


async def test_requests_with_a_certain_header_go_to_the_endpoint_that_asks_for_it():
    engine = fake_client()
    serving = Serving(Service(engine, Registry(None)), Activity(), FileReader((), 0, 0))
    apis = (api("every", "/models/{name:path}"), api("some", "/models/{model}", when="x-version"))
    app = Starlette(routes=[*routes_of(apis, serving)])
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        plain = await client.get("/models/one")
        special = await client.get("/models/one", headers={"X-Version": "1"})
        only_plain = await client.get("/models/owner/one", headers={"X-Version": "1"})
    engine.close()
    assert plain.json() == {"name": "every"}
    assert special.json() == {"name": "some"}
    assert only_plain.json() == {"name": "every"}, "the path of the other does not match"
