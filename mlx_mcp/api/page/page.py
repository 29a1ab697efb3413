"""The page for whoever runs the server, at /, and the state that it shows, at /page/state. Reads only.

The page is one file with its style and script, which the policy names by their digests: nothing else runs in it, and it
asks no other server. It has no data itself, so anybody may have it; the state needs the token where there is one, for
which the page asks.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mlx_mcp.service.overview import overview
from mlx_mcp.service.service import Service

INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def page_routes(service: Service) -> list[Route]:
    """The routes of the page."""

    async def show(request: Request) -> Response:
        return page()

    async def state(request: Request) -> Response:
        tenant = request.scope.get("state", {}).get("tenant", "")
        return JSONResponse(overview(service, tenant), headers={"cache-control": "no-store"})

    return [Route("/", show, methods=["GET"]), Route("/page/state", state, methods=["GET"])]


def page() -> Response:
    """The page."""
    text, policy = text_and_policy()
    headers = {
        "cache-control": "no-cache",
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
    return HTMLResponse(text, headers=headers)


@cache
def text_and_policy() -> tuple[str, str]:
    """The page's text, and the policy by which only its own style and script are used."""
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    digests: dict[str, list[str]] = {"style": [], "script": []}
    for kind, inside in INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        digests[kind].append(f"'sha256-{digest}'")
    policy = {
        "default-src": ["'none'"],
        "connect-src": ["'self'"],
        "style-src": digests["style"],
        "script-src": digests["script"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
    return text, "; ".join(f"{name} {' '.join(values)}" for name, values in policy.items())
