"""The APIs that are served over HTTP, put together."""

from __future__ import annotations

from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_mcp import __version__
from mlx_mcp.api.anthropic import api as anthropic
from mlx_mcp.api.http.app import http_app
from mlx_mcp.api.http.token import auth_settings
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.api.openai.api import OPENAI
from mlx_mcp.api.sessions.endpoints import SESSIONS
from mlx_mcp.api.web.endpoint import Api, Serving, routes_of
from mlx_mcp.api.web.openapi import openapi
from mlx_mcp.config import Config
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service

APIS: tuple[Api, ...] = (OPENAI, anthropic.API, SESSIONS)


def web_app(service: Service, activity: Activity, config: Config) -> ASGIApp:
    """All that is served over HTTP: MCP, and each of the other APIs."""
    files = FileReader(config.file_roots or (), config.max_file_bytes, config.max_files_bytes)
    mcp = build_server(service, files, activity, config.wait_s, **auth_settings(config))
    serving = Serving(service, activity, files)
    return http_app(mcp, service, config, [*routes_of(APIS, serving), Route("/openapi.json", show_openapi)])


async def show_openapi(request: Request) -> Response:
    """The OpenAPI document."""
    return JSONResponse(document())


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document of all APIs but MCP."""
    return openapi(APIS, __version__)
