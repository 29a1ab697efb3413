"""The files in docs/deploy say what their programs read."""

import os
import plistlib
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from mlx_mcp.cli.main import app

DEPLOY = Path(__file__).parent.parent / "docs" / "deploy"


def command_of(words):
    """Check that a command line is one of ours, and return its path."""
    path, *arguments = words
    name, *flags = arguments
    command = get_command(app).commands[name]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert set(flags) <= known
    return path


def test_the_launchd_agent_starts_the_server_and_lets_it_end():
    with (DEPLOY / "io.github.mlx-mcp.plist").open("rb") as file:
        agent = plistlib.load(file)
    assert command_of(agent["ProgramArguments"]).endswith("/mlx-mcp")
    assert agent["Label"] == "io.github.mlx-mcp"
    assert agent["ExitTimeOut"] > 2 * 5 + 5  # the longest that an end takes by default
    assert agent["Umask"] == 0o077
    assert agent["KeepAlive"] == {"SuccessfulExit": False}


def test_the_systemd_unit_starts_the_server_and_lets_it_end():
    unit = (DEPLOY / "mlx-mcp.service").read_text()
    said = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    assert command_of(said["ExecStart"].split()).endswith("/mlx-mcp")
    assert int(said["TimeoutStopSec"]) > 2 * 5 + 5


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_takes_the_unit_without_a_word(tmp_path):
    program = tmp_path / ".local" / "bin" / "mlx-mcp"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    env = os.environ | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(run)}
    # Named in full: what systemd reads for %h is the home of the user database.
    unit = tmp_path / "mlx-mcp.service"
    unit.write_text((DEPLOY / "mlx-mcp.service").read_text().replace("%h", str(tmp_path)))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", str(unit)], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
