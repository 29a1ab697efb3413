"""`mlx-mcp sandbox`, over a folder that a server has filled, and through an engine that runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mlx_mcp.cli.completion import sandbox_names
from mlx_mcp.cli.main import app
from mlx_mcp.storage.sandbox_log import SandboxLog
from mlx_mcp.workflows.sandbox.monty import open_runtime
from tests.process.windows import Window, run, state_folder
from tests.service.house import CALLER
from tests.storage.sandboxes import open_log, sandbox
from tests.workflows.sandbox.processes import process

CODE = "table = {'a': [1, 2.5, None], 'b': 'x'}\ntext = 'CANARY \\u2603\\n' * 3\nname = 1"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the sandbox `labels`, which has a version."""
    store = tmp_path_factory.mktemp("parent") / "store"

    async def fill() -> None:
        async with process(await open_runtime(store.parent / "start"), store / "sandboxes") as server:
            made = await server.sandboxes.create(server.service, CALLER, "labels")
            await server.run(made, CODE)
            await server.sandboxes.keeping.persist(server.service, CALLER, made, "v1")
            await server.run(made, "name = 2")

    asyncio.run(fill())
    return store


@pytest.fixture
def folder(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_MCP_STORE_DIR", str(filled))
    monkeypatch.setenv("MLX_MCP_MAX_SSD_BYTES", str(1 << 30))
    return filled


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["sandbox", *arguments])


def test_get_writes_a_text_as_it_is_and_everything_else_as_json(folder: Path) -> None:
    assert invoke("get", "labels", "text").stdout_bytes == "CANARY \u2603\n".encode() * 3
    assert json.loads(invoke("get", "labels", "table").output) == {"a": [1, 2.5, None], "b": "x"}
    assert invoke("get", "labels", "name").output == "2\n"
    assert invoke("get", "labels", "name", "--version", "v1").output == "1\n"


def test_what_is_not_there_is_told_with_the_next_step(folder: Path) -> None:
    assert "`mlx-mcp sandbox list`" in invoke("get", "nothing", "name").output
    assert "--version" in invoke("get", "labels", "name", "--version", "v2").output
    for variable in ("missing", "submit(1)"):
        shown = invoke("get", "labels", variable)
        assert shown.exit_code == 2
        assert "There is no variable" in shown.output


def test_list_shows_every_sandbox_and_version_without_a_value(folder: Path) -> None:
    found = json.loads(invoke("list", "--json").output)
    assert [(head["name"], head["version"], head["persisted"]) for head in found] == [
        ("labels", "", True),
        ("labels", "v1", True),
    ]
    shown = invoke("list").output
    assert shown.count("labels") == 2
    assert "CANARY" not in shown
    assert sandbox_names("lab") == ["labels"]


def test_where_no_sandbox_was_ever_kept_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MCP_STORE_DIR", str(tmp_path / "nowhere"))
    assert "There is no sandbox" in invoke("list").output
    assert json.loads(invoke("list", "--json").stdout) == []
    for arguments in (("get", "labels", "name"), ("rm", "labels")):
        shown = invoke(*arguments)
        assert (shown.exit_code, "Sandbox not found: 'labels'" in shown.output) == (2, True)
    assert sandbox_names("") == []
    assert not (tmp_path / "nowhere").exists()


def test_rm_removes_a_version_or_all_of_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MCP_STORE_DIR", str(tmp_path / "store"))
    log = open_log(tmp_path / "store" / "sandboxes")
    for version in ("", "v1", "v2"):
        log.save(sandbox("x-1", name="labels", version=version, remembered={}))
    log.save(sandbox("x-2"))
    log.close()
    assert invoke("rm", "labels", "--version", "v1").output == "removed 1\n"
    assert invoke("rm", "labels").output == "removed 2\n"
    log = SandboxLog.look(tmp_path / "store" / "sandboxes")  # which a server may have open
    assert [head.sandbox_id for head in log.heads()] == ["x-2"]
    log.close()
    assert invoke("rm", "x-2").output == "removed 1\n", "the session that it remembered by may be gone"


def test_purge_asks_first_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MCP_STORE_DIR", str(tmp_path / "store"))
    assert invoke("purge", "--yes").output == "purged\n"
    assert not (tmp_path / "store").exists()
    kept = tmp_path / "store" / "sandboxes"
    log = open_log(kept)
    log.save(sandbox("x-1"))
    log.close()
    (kept / "damaged.sandbox.safetensors.bad").write_bytes(b"CANARY")
    assert CliRunner().invoke(app, ["sandbox", "purge"], input="n\n").exit_code == 1
    assert len(list(kept.glob("*.sandbox.*"))) == 2
    assert invoke("purge", "--yes").exit_code == 0
    assert {path.name for path in kept.iterdir()} == {"key", "key.copy", "lock"}


@pytest.mark.long
def test_every_command_works_while_an_engine_runs_and_the_same_without(tmp_path: Path) -> None:
    settings = {"MLX_MCP_STORE_DIR": str(tmp_path / "store"), "MLX_MCP_MAX_SSD_BYTES": str(1 << 30)}
    with state_folder(**settings) as (_, env), Window(env) as window:

        def command(*arguments: str, expect: int = 0) -> str:
            done = run(env, "sandbox", *arguments, cwd=tmp_path)
            assert done.returncode == expect, done.stderr
            return str(done.stdout if expect == 0 else done.stderr)

        handle = window.ask("sandbox_run", code=CODE, name="labels")["sandbox"]
        window.ask("persist_session", session="labels", version="v1")
        window.ask("sandbox_run", code="name = 2", sandbox="labels")
        for _ in range(2):
            assert handle in command("list")
            assert json.loads(command("get", "labels", "table")) == {"a": [1, 2.5, None], "b": "x"}
            assert command("get", "labels", "name") == "2\n"
            assert command("get", "labels", "name", "--version", "v1") == "1\n"
            assert "There is no variable 'nothing'" in command("get", "labels", "nothing", expect=2)
            assert run(env, "engine", "stop").returncode == 0
        assert window.ask("sandbox_run", code="print(name)", sandbox="labels")["output"] == "2\n"
        assert command("rm", "labels", "--version", "v1") == "removed 1\n"
        assert command("rm", "labels") == "removed 1\n"
        assert "sandboxes" not in window.ask("list_sessions")
        assert "not found" in command("rm", "labels", expect=2)
        window.ask("sandbox_run", code=CODE, name="again")
        assert command("purge", "--yes") == "purged\n"
        assert "sandboxes" not in window.ask("list_sessions")
        assert json.loads(command("list", "--json")) == []
