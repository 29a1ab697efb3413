"""The APIs that are served over HTTP, put together."""

from __future__ import annotations

from starlette.types import ASGIApp

from mlx_mcp.api.http.app import http_app
from mlx_mcp.api.http.token import auth_settings
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.api.page.page import page_routes
from mlx_mcp.api.web.endpoint import Api, Serving, routes_of
from mlx_mcp.config import Config
from mlx_mcp.service.activity import Activity
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.service import Service

APIS: tuple[Api, ...] = ()


def web_app(service: Service, activity: Activity, config: Config) -> ASGIApp:
    """All that is served over HTTP: MCP, and each of the other APIs."""
    files = FileReader(config.file_roots or (), config.max_file_bytes, config.max_files_bytes)
    mcp = build_server(service, files, activity, config.wait_s, **auth_settings(config))
    serving = Serving(service, activity, files)
    routes = [route for api in APIS for route in routes_of(api, serving)]
    return http_app(mcp, service, config, [*page_routes(service), *routes])
