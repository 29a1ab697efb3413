"""Who gets in over HTTP: every route with every kind of token that is none, on a real socket."""

import contextlib
import logging

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError
from mlx_mcp.hosting.access import access_of
from mlx_mcp.process.place import Place
from mlx_mcp.storage.token_file import TokenFile
from tests.api.http.routes import routes, serving_all
from tests.api.http.test_gate import INITIALIZE
from tests.api.mcp.test_tools import generate
from tests.fakes import fake_client


@pytest.fixture
def engine():
    engine = fake_client()
    yield engine
    engine.close()


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    """The file of tokens that a server looks at."""
    monkeypatch.setenv("MLX_MCP_STATE_DIR", str(tmp_path / "state"))
    Place(str(tmp_path / "state")).prepare()
    return TokenFile(tmp_path / "state")


def bearer(token):
    return {"authorization": f"Bearer {token}"}


@contextlib.asynccontextmanager
async def client_of(address, token, mode="auto"):
    async with (
        httpx2.AsyncClient(headers=bearer(token)) as http,
        Client(streamable_http_client(f"{address}/mcp", http_client=http), mode=mode) as client,
    ):
        yield client


async def test_every_route_refuses_whoever_has_no_valid_token(engine, tokens):
    good, gone, old = tokens.add("ann"), tokens.add("bob"), tokens.add("eve", expires_at=1.0)
    tokens.revoke("bob")
    wrong = {
        "none": {},
        "another": bearer("nope"),
        "revoked": bearer(gone),
        "revoked key": {"x-api-key": gone},
        "expired": bearer(old),
        "another scheme": {"authorization": f"Basic {good}"},
        "no ASCII": {"authorization": "Bearer ünï".encode()},
        "very long": bearer("x" * 20_000),
        "empty": {"authorization": "Bearer"},
        "two": [("authorization", f"Bearer {good}"), ("authorization", "Bearer x")],
        "two keys": [("x-api-key", good), ("x-api-key", good)],
        "a key beside another token": [("authorization", "Bearer nope"), ("x-api-key", good)],
        "in a cookie": {"cookie": f"token={good}"},
    }
    async with serving_all(engine) as address, httpx2.AsyncClient() as http:
        for method, path in routes():
            asked = (
                wrong
                if path == "/health"
                else {what: wrong[what] for what in ("none", "another", "revoked", "expired")}
            )
            for what, headers in asked.items():
                response = await http.request(method, address + path, headers=headers)
                assert (method, path, what, response.status_code) == (method, path, what, 401)
                assert response.headers["www-authenticate"].startswith("Bearer")
            for also in ({}, bearer(good)):
                response = await http.request(method, f"{address}{path}?token={good}", headers=also)
                assert (method, path, response.status_code) == (method, path, 401)
                assert "revoke it, and send another as" in response.text
            for right in (bearer(good), {"x-api-key": good}):
                response = await http.request(method, address + path, headers=right)
                assert response.status_code != 401, (method, path)
        assert (await http.get(f"{address}/health", headers={"authorization": f"bearer {good}"})).status_code == 200


async def test_a_token_in_the_query_is_refused_under_whatever_name(engine, tokens):
    good = tokens.add("ann")
    async with serving_all(engine) as address, httpx2.AsyncClient(headers=bearer(good)) as http:
        for name in ("token", "access_token", "api_key", "API-Key", "Token", "to%6ben", "authorization"):
            assert (await http.get(f"{address}/health?{name}={good}")).status_code == 401
        assert (await http.get(f"{address}/health?page_token={good}")).status_code == 200


async def test_what_is_wrong_is_said_in_the_form_of_the_api_that_was_asked(engine, tokens):
    tokens.add("ann")
    async with serving_all(engine) as address, httpx2.AsyncClient() as http:
        none = await http.post(f"{address}/echo/x", json={"text": "a"})
        bad = await http.post(f"{address}/echo/x", json={"text": "a"}, headers=bearer("nope"))
        plain = await http.post(f"{address}/mcp", json=INITIALIZE)
    assert "This server needs a token. Send it as" in none.json()["oops"]
    assert none.headers["www-authenticate"] == "Bearer"
    assert "is unknown, was revoked, has expired, or is for another server" in bad.json()["oops"]
    assert bad.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert "This server needs a token" in plain.json()["error"]


async def test_that_the_process_lives_is_told_to_everyone(engine, tokens):
    tokens.add("ann")
    async with serving_all(engine) as address, httpx2.AsyncClient() as http:
        for path in ("/health/live", "/"):
            assert (await http.get(address + path)).status_code != 401
        for path in ("/health", "/health/live/", "/health/live/x", "//", "/health/ready"):
            assert (await http.get(address + path)).status_code == 401


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_token_that_is_revoked_lets_its_client_in_no_more(engine, tokens, mode):
    ann, bob = tokens.add("ann"), tokens.add("bob")
    async with serving_all(engine) as address, client_of(address, bob, mode) as stays:
        async with client_of(address, ann, mode) as leaves:
            assert (await generate(leaves)).structured_content["text"] == "hello"
            tokens.revoke("ann")
            with pytest.raises(MCPError):
                await generate(leaves)
            assert (await generate(stays)).structured_content["text"] == "hello"


async def test_callers_of_this_machine_need_a_token_from_the_moment_that_there_is_one(engine, tokens):
    async with serving_all(engine) as address, httpx2.AsyncClient() as http:
        assert (await http.get(f"{address}/health")).status_code == 200
        tokens.add("ann")
        assert (await http.get(f"{address}/health")).status_code == 401
        tokens.revoke("ann")  # which must open the server to nobody
        assert (await http.get(f"{address}/health")).status_code == 401


async def test_a_spoilt_file_lets_nobody_in_but_by_the_token_of_the_settings_and_is_told_once(engine, tokens, caplog):
    token = tokens.add("ann")
    async with serving_all(engine, token="s3cret") as address, httpx2.AsyncClient() as http:
        assert (await http.get(f"{address}/health", headers=bearer(token))).status_code == 200
        tokens.path.chmod(0o644)
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                assert (await http.get(f"{address}/health", headers=bearer(token))).status_code == 401
        assert len([r for r in caplog.records if "nobody is let in by a token of the file" in r.getMessage()]) == 1
        assert token not in caplog.text
        assert (await http.get(f"{address}/health", headers=bearer("s3cret"))).status_code == 200


async def test_every_face_knows_a_caller_by_the_name_of_the_token(engine, tokens):
    heard = []
    for_real = engine.generate

    def generate_noting(request):
        heard.append(request.tenant)
        return for_real(request)

    engine.generate = generate_noting
    ann = tokens.add("ann")
    async with serving_all(engine, token="s3cret") as address, httpx2.AsyncClient() as http:
        for token in (ann, "s3cret"):
            response = await http.post(f"{address}/echo/x", json={"text": "hello"}, headers={"x-api-key": token})
            assert response.json()["text"] == "hello"
            for mode in ("auto", "legacy"):
                async with client_of(address, token, mode) as client:
                    await generate(client)
    assert heard == ["ann"] * 3 + ["default"] * 3


def test_serving_others_without_a_token_is_refused(tokens):
    with pytest.raises(
        ConfigError, match=r"lets others in, so it needs a token: make one with `mlx-mcp token add NAME`"
    ):
        access_of(Config.load(host="0.0.0.0"))
    assert access_of(Config.load(host="0.0.0.0", token="x")).required
    tokens.add("ann")
    access = access_of(Config.load(host="0.0.0.0"))
    tokens.path.unlink()
    assert access.required  # once others are served
