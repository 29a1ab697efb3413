"""The harness of `make hosts`: what it asks of every host holds of this server, and it says so where it does not."""

import io
import re
import sys

import pytest
from mcp import Client

from benchmarks.hosts import conformance, packages
from benchmarks.hosts.__main__ import passed
from benchmarks.hosts.clients.story import TOOLS, ToolFailed, tell
from benchmarks.hosts.fixtures import add_fixtures
from mlx_mcp.api.mcp.server import build_server
from mlx_mcp.config import Config
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.wiring import wire
from tests.fakes import fake_client

SUMMARY = """
=== SUMMARY ===
✓ ping: 2 passed, 0 failed
{} tools-list: 3 passed, 0 failed
✗ server-sse-polling: 0 passed, 1 failed
{} other: 1 passed, 0 failed

Total: 6 passed, 1 failed

Not scored for 2025-11-25: 2 scenario(s) run, 1 failing. These do not affect conformance.
  ✗ server-sse-polling (pending)
  {} other (pending)
"""


@pytest.fixture
def engine():
    client, _ = wire(Config.load())
    yield client
    assert client.close()


async def test_the_story_that_client_libraries_are_told_holds(engine):
    async with Client(build_server(Service(engine, Registry(None)))) as client:

        async def call(tool, arguments):
            result = await client.call_tool(tool, arguments)
            if result.is_error:
                raise ToolFailed(result.content[0].text)
            return result.structured_content

        await tell([tool.name for tool in (await client.list_tools()).tools], call)
        assert (await call("list_sessions", {}))["sessions"] == []


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_the_conformance_fixtures_come_beside_the_tools(mode):
    engine = fake_client()
    server = build_server(Service(engine, Registry(None)))
    add_fixtures(server)
    async with Client(server, mode=mode) as client:
        names = [tool.name for tool in (await client.list_tools()).tools]
        assert names[: len(TOOLS)] == TOOLS
        assert "test_simple_text" in names
        uris = {str(resource.uri) for resource in (await client.list_resources()).resources}
        assert "test://static-text" in uris
        assert "test_simple_prompt" in {prompt.name for prompt in (await client.list_prompts()).prompts}
    assert engine.close()


def test_conformance_passes_where_only_what_is_expected_fails():
    assert conformance.judged(SUMMARY.format("✓", "✓", "✓")) == "2 required scenarios pass; 1 others fail as expected"


@pytest.mark.parametrize("output", [SUMMARY.format("✗", "✓", "✓"), SUMMARY.format("✓", "✗", "✗"), "npm ERR!"])
def test_conformance_fails_where_anything_else_does(output):
    with pytest.raises(AssertionError):
        conformance.judged(output)


@pytest.mark.parametrize("said", ["npm error code ENOTFOUND", "WARNING: Retrying after NewConnectionError('pypi.org')"])
def test_a_registry_that_cannot_be_reached_is_told_from_packages_that_are_at_fault(said, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "WORK", tmp_path)
    fails = [sys.executable, "-c", f"raise SystemExit({said!r})"]
    with pytest.raises(packages.Unreachable, match=re.escape(said)):
        packages.done(*fails)
    with pytest.raises(RuntimeError, match="E404"):
        packages.done(sys.executable, "-c", "raise SystemExit('npm error code E404')")


def test_a_check_that_fails_is_one_line_and_no_end(capsys):
    def fail():
        raise RuntimeError("a traceback\nno such host")

    log = io.StringIO()
    assert [passed("first", fail, log), passed("second", lambda: "fine", log)] == [False, True]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("FAILED")
    assert first.endswith("first: no such host")
    assert second.startswith("ok")
    assert log.getvalue() == "first: RuntimeError: a traceback\nno such host\n\n"
