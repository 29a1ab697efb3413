"""Sandboxes that are kept, as an MCP client sees them: persisted, listed, forked, closed, and read as resources."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp_types import ElicitRequestParams, ElicitResult

from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.engine.client import EngineClient
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.storage.sandbox_log import SandboxLog
from mlx_mcp.workflows.sandbox.keeping import Keeping
from mlx_mcp.workflows.sandbox.runtime import HostCall
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes
from tests.fakes import FakeLoader, FakeStore, fake_client
from tests.workflows.fakes import FakeRuntime

Run = Generator[HostCall, Any, Any]


def counts(v: dict[str, Any], say: Any) -> Run:
    v["n"] = v.get("n", 0) + 1
    v["said"] = yield HostCall("llm_map", ("Say:", ["CANARY"]))
    say(f"n is {v['n']}")


def remembers(v: dict[str, Any], say: Any) -> Run:
    yield HostCall("remember", ("A long text.", "text"))


def fails(v: dict[str, Any], say: Any) -> Run:
    raise KeyError("```")
    yield


PROGRAMS = {each.__name__: each for each in (counts, remembers, fails)}


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def engine(store: FakeStore) -> Generator[EngineClient]:
    engine = fake_client(FakeLoader(context_tokens=2000), block_tokens=16, open_store=lambda: store)
    yield engine
    assert engine.close()


@pytest.fixture
def sandboxes(tmp_path: Path) -> Sandboxes:
    keeping = Keeping(lambda: SandboxLog.open(tmp_path / "kept", quota_bytes=1 << 20))
    return Sandboxes(FakeRuntime(dict(PROGRAMS)).opened, keeping)


def connect(engine: EngineClient, sandboxes: Sandboxes, **more: Any) -> Client:
    return Client(build_server(Service(engine, Registry(None)), sandboxes=sandboxes), **more)


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content[0]
    return dict(result.structured_content or {})


async def read(client: Client, uri: str) -> str:
    return str((await client.read_resource(uri)).contents[0].text)  # type: ignore[union-attr]


async def test_a_sandbox_is_persisted_listed_and_forked_by_the_rules_of_sessions(
    engine: EngineClient, sandboxes: Sandboxes, store: FakeStore
) -> None:
    async with connect(engine, sandboxes) as client:
        handle = (await call(client, "sandbox_run", code="counts", name="mail"))["sandbox"]
        await call(client, "sandbox_run", code="remembers", sandbox="mail")
        kept = await call(client, "persist_session", session="mail", version="v1")
        assert kept.pop("written_bytes") > 100
        assert kept == {
            "session": handle,
            "name": "mail",
            "version": "v1",
            "remembered": 1,
            "expires_in_s": 30 * 86400,
        }
        await call(client, "sandbox_run", code="counts", sandbox="mail")
        [listed] = (await call(client, "list_sessions"))["sandboxes"]
        assert (listed["persisted"], listed["versions"]) == (True, ["v1"])
        [fork] = (await call(client, "fork_session", session="mail", version="v1"))["sessions"]
        ran = await call(client, "sandbox_run", code="counts", sandbox=fork)
        assert ran["output"] == "n is 2\n"
        assert len(store.records) == 2
    await sandboxes.end()


@pytest.mark.parametrize("agreed", [True, False])
async def test_before_a_persisted_sandbox_is_deleted_the_user_is_asked(
    engine: EngineClient, sandboxes: Sandboxes, tmp_path: Path, agreed: bool
) -> None:
    async def answer(context: Any, asked: ElicitRequestParams) -> ElicitResult:
        assert "mail" in asked.message
        return ElicitResult(action="accept", content={"go_ahead": agreed})

    async with connect(engine, sandboxes, elicitation_callback=answer) as client:
        handle = (await call(client, "sandbox_run", code="counts", name="mail"))["sandbox"]
        await call(client, "persist_session", session="mail")
        other = (await call(client, "sandbox_run", code="counts"))["sandbox"]
        assert await call(client, "close_session", all=True) == {"closed": [other]}, "what is persisted stays"
        closed = await client.call_tool("close_session", {"sessions": ["mail"]})
        if agreed:
            assert (closed.structured_content or {})["closed"] == [handle]
            assert not list((tmp_path / "kept").glob("*.sandbox.safetensors"))
        else:
            assert closed.is_error
            assert (await call(client, "list_sessions"))["sandboxes"]
    await sandboxes.end()


async def test_the_resources_show_what_there_is_and_what_was_run(engine: EngineClient, sandboxes: Sandboxes) -> None:
    async with connect(engine, sandboxes) as client:
        handle = (await call(client, "sandbox_run", code="counts", name="mail"))["sandbox"]
        await call(client, "sandbox_run", code="fails", sandbox="mail")
        shown = json.loads(await read(client, "mlx://sandboxes/mail"))
        assert (shown["sandbox"], shown["variables"], shown["versions"]) == (handle, {"n": "int", "said": "list"}, [])
        told = await read(client, f"mlx://sandboxes/{handle}/trajectory")
        assert told.startswith("# Sandbox mail\n\n## Run 1, 20")
        assert "```python\ncounts\n```\n\nIt printed:\n\n```\nn is 1\n```\n\nCalls: 1.\n" in told
        assert told.endswith("```python\nfails\n```\n\nCalls: 0. It ended with KeyError.\n")
        assert "CANARY" not in told
        for uri in ("mlx://sandboxes/nobody", "mlx://sandboxes/nobody/trajectory"):
            with pytest.raises(MCPError, match="Sandbox not found: 'nobody'"):
                await client.read_resource(uri)
    await sandboxes.end()


async def test_sessions_and_sandboxes_are_found_by_what_was_said_in_them(
    engine: EngineClient, sandboxes: Sandboxes
) -> None:
    async with connect(engine, sandboxes) as client:
        one = await call(client, "create_session", system="The badge of Alice is 771.")
        await call(client, "create_session", system="The badge of Bob is 208.")
        await call(client, "persist_session", session=one["session"])
        mail = (await call(client, "sandbox_run", code="counts", name="mail"))["sandbox"]
        await call(client, "sandbox_run", code="fails")

        async def found(text: str) -> list[str]:
            listed = await call(client, "list_sessions", text=text)
            assert "not_shown" not in listed
            sessions = [each["session"] for each in listed["sessions"]]
            return sessions + [each["sandbox"] for each in listed.get("sandboxes", [])]

        assert await found("of ALICE") == [one["session"]]
        assert await found("N is 1") == [mail]
        assert await found("COUNTS") == [mail]
        assert await found("CANARY") == [], "what a model was asked is not looked at"
        assert len(await found("f")) == 3
        assert await found("nobody said that") == []
    await sandboxes.end()


async def test_in_the_next_process_tools_and_resources_find_what_was_kept(
    engine: EngineClient, sandboxes: Sandboxes, tmp_path: Path
) -> None:
    async with connect(engine, sandboxes) as client:
        handle = (await call(client, "sandbox_run", code="counts", name="mail"))["sandbox"]
    await sandboxes.end()

    def again() -> Sandboxes:
        keeping = Keeping(lambda: SandboxLog.open(tmp_path / "kept", quota_bytes=1 << 20))
        return Sandboxes(FakeRuntime(dict(PROGRAMS)).opened, keeping)

    first_calls: list[tuple[str, dict[str, Any]]] = [
        ("sandbox_run", {"code": "counts", "sandbox": "mail"}),
        ("fork_session", {"session": handle}),
        ("persist_session", {"session": "mail"}),
        ("list_sessions", {}),
        ("close_session", {"sessions": ["mail"], "confirm": True}),
    ]
    for tool, arguments in first_calls:
        found = again()
        async with connect(engine, found) as client:
            said = await call(client, tool, **arguments)
        assert handle in json.dumps(said) or tool == "fork_session"
        await found.end()
    found = again()
    async with connect(engine, found) as client:
        with pytest.raises(MCPError, match="not found"):
            await client.read_resource("mlx://sandboxes/mail")
    await found.end()
