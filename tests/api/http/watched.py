"""An app over fakes, asked without a socket."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from mlx_mcp.api.web.endpoint import Api
from mlx_mcp.config import Config
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.hosting import faces
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.service import Service


@contextlib.asynccontextmanager
async def watched(
    engine: EngineClient, apis: tuple[Api, ...] | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx2.AsyncClient, Service]]:
    """A client of an app, and its service; the app has the product's own faces unless others are given."""
    service = Service(engine, Registry(None))
    before = faces.APIS
    faces.APIS = before if apis is None else apis
    try:
        app = faces.web_app(service, Activity(), Config.load(**settings))
    finally:
        faces.APIS = before
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080", timeout=30) as http:
        yield http, service
