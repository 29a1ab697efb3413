"""Access tokens of a real authorization server, oidc-provider of npm: who gets in with which, and what is whose."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from benchmarks.hosts.place import NODE, WORK
from tests.hosts.conftest import served
from tests.process.windows import state_folder

AUDIENCE = "https://models.example/mcp"
WAIT_S = 60


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    """The address of an authorization server that knows ann and bob."""
    modules = WORK / "node_modules"
    if not (modules / "oidc-provider").is_dir():
        pytest.skip("oidc-provider is not there: `make test-claude-code` installs it from npm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("authorization_server.mjs")
    with subprocess.Popen(
        [NODE / "node", script, str(port), modules], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        assert any("ready" in line for line in server.stdout)
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@pytest.fixture(scope="module")
def address(issuer: str) -> Iterator[str]:
    """The address of a server that lets in whom that one has given a token for it."""
    oauth = {"MLX_MCP_OAUTH_ISSUER": issuer, "MLX_MCP_OAUTH_AUDIENCE": AUDIENCE, "MLX_MCP_OAUTH_SCOPES": "mlx"}
    with state_folder(**oauth) as (_, env), served("http", env) as entry:
        yield str(entry["url"])


def token(issuer: str, name: str, audience: str = AUDIENCE, scope: str = "mlx") -> str:
    """A client's access token for an audience."""
    asked = {"grant_type": "client_credentials", "client_id": name, "client_secret": f"secret-of-{name}"}
    answer = httpx2.post(f"{issuer}/token", data=asked | {"resource": audience, "scope": scope}, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


def status(address: str, given: str | None) -> int:
    """With what a request with a token is answered."""
    headers = {} if given is None else {"authorization": f"Bearer {given}"}
    return httpx2.get(address.removesuffix("/mcp") + "/v1/models", headers=headers, timeout=WAIT_S).status_code


@asynccontextmanager
async def client(address: str, given: str) -> AsyncIterator[Client]:
    """An MCP client with a token."""
    headers = {"authorization": f"Bearer {given}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=WAIT_S) as http,
        Client(streamable_http_client(address, http_client=http)) as mcp,
    ):
        yield mcp


def test_a_client_finds_the_authorization_server_from_the_refusal(issuer: str, address: str) -> None:
    refused = httpx2.post(address, json={}, timeout=WAIT_S)
    assert refused.status_code == 401
    metadata = refused.headers["www-authenticate"].partition('resource_metadata="')[2].partition('"')[0]
    assert metadata.startswith("https://models.example/.well-known/oauth-protected-resource")
    path = metadata.removeprefix("https://models.example")
    told = httpx2.get(address.removesuffix("/mcp") + path, timeout=WAIT_S).json()
    assert [each.rstrip("/") for each in told["authorization_servers"]] == [issuer]
    assert told["resource"].rstrip("/") == AUDIENCE


def test_only_an_unchanged_token_for_this_server_gets_in(issuer: str, address: str) -> None:
    good = token(issuer, "ann")
    head, claims, signature = good.split(".")
    changed = ".".join([head, claims, signature[::-1]])
    foreign = token(issuer, "ann", audience="https://elsewhere.example/mcp")
    given = {"none": None, "changed": changed, "foreign": foreign, "a word": "ann"}
    assert {name: status(address, each) for name, each in given.items()} == dict.fromkeys(given, 401)
    assert status(address, token(issuer, "ann", scope="")) == 403
    assert status(address, good) == 200


async def test_what_one_subject_made_is_not_there_for_another(issuer: str, address: str) -> None:
    ann, bob, ann_again = token(issuer, "ann"), token(issuer, "bob"), token(issuer, "ann")
    assert ann != ann_again
    async with client(address, ann) as mine:
        made = await mine.call_tool("create_session", {"system": "Be kind.", "name": "notes"})
        assert not made.is_error, made.content
    async with client(address, bob) as other:
        assert (await other.call_tool("list_sessions", {})).structured_content == {"sessions": []}
        foreign = await other.call_tool("generate", {"prompt": "Go on.", "session": "notes"})
        assert foreign.is_error
    async with client(address, ann_again) as mine:
        sessions = json.dumps((await mine.call_tool("list_sessions", {})).structured_content)
        assert '"notes"' in sessions
