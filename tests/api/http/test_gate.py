"""Hosts, origins and browsers over HTTP, the same for every route, on a real socket."""

import asyncio
import socket

import httpx2
import pytest

from mlx_mcp.api.http.gate import Gate
from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError
from tests.api.http.test_http import serving
from tests.fakes import fake_client

PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
ROUTES = [("GET", "/health"), ("POST", "/mcp"), ("GET", "/mcp"), ("DELETE", "/mcp"), ("GET", "/nowhere")]
EVIL_HOSTS = ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost@evil", "", "10.0.0.1", "a b"]
EVIL_ORIGINS = ["null", "http://evil.example", "https://localhost.evil.example", "http://localhost@evil", "file://", ""]
OWN_ORIGINS = ["http://localhost:6274", "http://127.0.0.1", "https://localhost:8443", "http://[::1]:80"]


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


async def ask(http, address, method, route, **headers):
    return await http.request(method, address + route, json=PING if method == "POST" else None, headers=headers)


@pytest.mark.parametrize(("method", "route"), ROUTES)
async def test_every_route_refuses_names_that_are_not_ours_and_pages_of_others(engine, method, route):
    async with serving(engine) as address, httpx2.AsyncClient() as http:
        for host in EVIL_HOSTS:
            response = await ask(http, address, method, route, host=host)
            assert (host, response.status_code) == (host, 421)
            assert "is not known to be this server. MLX_MCP_ALLOWED_HOSTS lists other names" in response.text
        for origin in EVIL_ORIGINS:
            response = await ask(http, address, method, route, origin=origin)
            assert (origin, response.status_code) == (origin, 403)
            assert "may not call this server. MLX_MCP_ALLOWED_ORIGINS lists those that may" in response.text
            assert not [name for name in response.headers if name.startswith("access-control")]
        port = address.rpartition(":")[2]
        for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert (await ask(http, address, method, route, host=host)).status_code not in (403, 421)


@pytest.mark.parametrize("origin", OWN_ORIGINS)
async def test_a_page_of_this_machine_may_ask_call_and_read(engine, origin):
    asked = "authorization, content-type, mcp-session-id, mcp-protocol-version, last-event-id, mcp-param-x"
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": asked}
    async with serving(engine, token="s3cret") as address, httpx2.AsyncClient() as http:
        preflight = await ask(http, address, "OPTIONS", "/mcp", origin=origin, **wanted)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == origin
        assert set(asked.split(", ")) <= set(preflight.headers["access-control-allow-headers"].split(", "))
        assert {"GET", "POST", "DELETE"} <= set(preflight.headers["access-control-allow-methods"].split(", "))
        refused = await ask(http, address, "POST", "/mcp", origin=origin)  # without the token, and it may read that
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)
        begun = await http.post(
            f"{address}/mcp", json=INITIALIZE, headers={"origin": origin, "authorization": "Bearer s3cret"}
        )
        assert begun.headers["access-control-allow-origin"] == origin
        exposed = begun.headers["access-control-expose-headers"].split(", ")
        assert "mcp-session-id" in begun.headers
        assert "mcp-session-id" in exposed
        assert "Origin" in begun.headers["vary"]


INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}


async def test_no_other_page_may_ask(engine):
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    async with serving(engine) as address, httpx2.AsyncClient() as http:
        for origin in EVIL_ORIGINS:
            response = await ask(http, address, "OPTIONS", "/mcp", origin=origin, **wanted)
            assert response.status_code == 403
            assert not [name for name in response.headers if name.startswith("access-control")]


async def test_a_caller_without_an_origin_is_no_page_and_gets_no_such_headers(engine):
    async with serving(engine) as address, httpx2.AsyncClient() as http:
        response = await http.get(f"{address}/health")
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_names_and_origins_that_were_allowed_get_in(engine):
    settings = {"allowed_hosts": ["Studio.local", "mlx.example:8443"], "allowed_origins": ["https://App.example"]}
    async with serving(engine, **settings) as address, httpx2.AsyncClient() as http:
        for host, status in (
            ("studio.local", 200),
            ("STUDIO.local:9", 200),
            ("mlx.example:8443", 200),
            ("mlx.example:9", 421),
            ("other.local", 421),
        ):
            assert (host, (await ask(http, address, "GET", "/health", host=host)).status_code) == (host, status)
        for origin, status in (
            ("https://app.example", 200),
            ("http://app.example", 403),
            ("https://app.example:9", 403),
        ):
            response = await ask(http, address, "GET", "/health", origin=origin)
            assert (origin, response.status_code) == (origin, status)


async def gate_says(config, host, origin=None):
    """The status that an app behind a gate answers with, or the gate instead."""
    heard = []

    async def app(scope, receive, send):
        heard.append(200)

    async def send(message):
        heard.append(message.get("status"))

    headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
    await Gate(app, config)({"type": "http", "method": "GET", "headers": headers}, None, send)
    return heard[0]


async def test_where_other_machines_connect_a_name_must_be_ours_or_an_address_and_pages_of_others_stay_out():
    config = Config.load(host="0.0.0.0", token="x")
    for host in ("192.168.1.5:8080", "[fe80::1]:8080", "localhost", "127.0.0.1:8080", socket.gethostname()):
        assert await gate_says(config, host) == 200
    assert await gate_says(config, "evil.example:8080") == 421
    assert await gate_says(config, "192.168.1.5", "http://192.168.1.5:8080") == 403
    assert await gate_says(config, "192.168.1.5", "null") == 403
    assert await gate_says(config, "192.168.1.5", "http://localhost:6274") == 200
    assert await gate_says(Config.load(host="studio.local", token="x"), "studio.local:80") == 200
    anywhere = Config.load(host="0.0.0.0", token="x", allowed_hosts=["*"])
    assert await gate_says(anywhere, "whoever.example") == 200


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("ALLOWED_ORIGINS", "app.example", "'app.example' is no origin, such as https://name"),
        ("ALLOWED_ORIGINS", "https://app.example/page", "is no origin"),
        ("ALLOWED_HOSTS", "https://studio.local", "is no name of a host"),
    ],
)
def test_what_no_header_could_ever_be_is_no_setting(monkeypatch, setting, value, words):
    monkeypatch.setenv(f"MLX_MCP_{setting}", value)
    with pytest.raises(ConfigError, match=words):
        Config.load()


def test_several_names_are_written_with_commas(monkeypatch):
    monkeypatch.setenv("MLX_MCP_ALLOWED_HOSTS", "studio.local, mlx.example:8443,")
    assert Config.load().allowed_hosts == ("studio.local", "mlx.example:8443")


async def test_a_request_without_a_name_is_refused(engine):
    async with serving(engine) as address:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        async with asyncio.timeout(20):
            assert (await reader.read()).startswith(b"HTTP/1.1 421")
        writer.close()
