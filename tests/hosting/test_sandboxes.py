"""What runs programs for a process, and where what starts it lies."""

import shutil
import stat
from pathlib import Path

import pytest

from mlx_mcp.config import Config
from mlx_mcp.errors import ConfigError, SandboxFailed
from mlx_mcp.hosting.sandboxes import sandboxes_of, user_runtime
from mlx_mcp.process.place import user_place


async def test_a_server_that_runs_programs_first_leaves_a_state_folder_that_an_engine_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "far" / "state"
    monkeypatch.setenv("MLX_MCP_STATE_DIR", str(folder))
    runtime = await user_runtime("monty")
    await runtime.close()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((folder / "sandbox").stat().st_mode) == 0o700
    user_place().prepare()


async def test_the_setting_says_which_python_runs_programs_and_nothing_stands_in_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    default = await sandboxes_of(Config.load()).runtime()
    assert default.version.startswith("monty ")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("MLX_MCP_SANDBOX_PYTHON", "cpython")
    with pytest.raises(SandboxFailed, match="MLX_MCP_SANDBOX_PYTHON=monty"):
        await sandboxes_of(Config.load()).runtime()
    monkeypatch.setenv("MLX_MCP_SANDBOX_PYTHON", "pypy")
    with pytest.raises(ConfigError, match="sandbox_python: Input should be 'monty' or 'cpython'"):
        Config.load()


async def test_where_the_folder_cannot_be_made_the_error_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_MCP_STATE_DIR", str(tmp_path / "file" / "state"))
    with pytest.raises(SandboxFailed, match="What starts sandboxes has no place: the folder"):
        await user_runtime("monty")
