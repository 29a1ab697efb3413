"""`mlx-mcp service`: the files say what launchd and systemd read, and the commands leave nothing behind."""

import os
import plistlib
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mlx_mcp.cli.main import app
from mlx_mcp.errors import InstallError
from mlx_mcp.install import service as services
from mlx_mcp.install.service import LABEL, service_file, unit

HOME = Path("/Users/ann")


def is_a_command_of_ours(words):
    path, *arguments = words
    assert os.path.isabs(path)
    name = arguments.index("serve")
    flags = {word for word in arguments[name + 1 :] if word.startswith("--")}
    command = get_command(app).commands["serve"]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return {"--standalone", "--http"} <= flags <= known


def test_the_launchd_agent_starts_the_server_and_lets_it_end():
    its = service_file(("--port", "8090"), "darwin", HOME, {})
    agent = plistlib.loads(its.data)
    assert its.path == HOME / "Library/LaunchAgents/io.github.mlx-mcp.plist"
    assert is_a_command_of_ours(agent["ProgramArguments"])
    assert agent["ProgramArguments"][-2:] == ["--port", "8090"]
    assert agent["Label"] == LABEL
    assert agent["ExitTimeOut"] > 2 * 5 + 5  # the longest that an end takes by default
    assert agent["Umask"] == 0o077
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert os.path.isabs(agent["StandardErrorPath"])
    domain = f"gui/{os.getuid()}"
    assert its.begin == (("launchctl", "bootstrap", domain, str(its.path)),)
    assert its.end == (("launchctl", "bootout", f"{domain}/{LABEL}"),)


def test_the_systemd_unit_starts_the_server_and_lets_it_end():
    its = service_file((), "linux", HOME, {})
    said = dict(line.split("=", 1) for line in its.data.decode().splitlines() if "=" in line and line[0] != "#")
    assert its.path == HOME / ".config/systemd/user/mlx-mcp.service"
    assert is_a_command_of_ours(said["ExecStart"].split())
    assert int(said["TimeoutStopSec"]) > 2 * 5 + 5
    assert service_file((), "linux", HOME, {"XDG_CONFIG_HOME": "/etc/ann"}).path.is_relative_to("/etc/ann")
    assert 'ExecStart="/a b/mlx-mcp" serve' in unit(("/a b/mlx-mcp", "serve"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_takes_the_unit_without_a_word(tmp_path):
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    file = tmp_path / "mlx-mcp.service"
    # Named in full: what systemd reads for %h is the home of the user database.
    file.write_bytes(service_file(("--port", "8090"), "linux", tmp_path, {}).data.replace(b"%h", bytes(tmp_path)))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", str(file)],
        env=os.environ | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(run)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_other_systems_and_odd_names_are_refused(monkeypatch):
    with pytest.raises(InstallError, match="services for macOS and Linux"):
        service_file((), "win32", HOME, {})
    with pytest.raises(InstallError, match="cannot stand in a service's file"):
        service_file(("--model", "a\nExecStartPre=/bin/x"), "linux", HOME, {})
    monkeypatch.setattr(services, "command_here", lambda: ("/home/$x/mlx-mcp", ("serve",)))
    with pytest.raises(InstallError, match="folder of a plain name"):
        service_file((), "linux", HOME, {})


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A user's folder, and a systemctl that writes down what it is told; returns both."""
    told, program = tmp_path / "told", tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {told}\ncase "$*" in *enable*) [ -z "$FAILS" ];; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path, told


def ask(*words):
    return CliRunner().invoke(app, ["service", *words])


def test_a_dry_run_changes_nothing_and_shows_all(system):
    folder, told = system
    done = ask("install", "--dry-run", "--port", "8090")
    assert done.exit_code == 0
    assert "would write" in done.output
    assert "would run systemctl --user enable --now mlx-mcp.service" in done.output
    assert not told.exists()
    assert not (folder / "config").exists()


def test_install_and_uninstall_leave_nothing_behind(system):
    folder, told = system
    file = folder / "config/systemd/user/mlx-mcp.service"
    for _ in range(2):  # the second replaces the first
        assert ask("install", "--port", "8090").exit_code == 0
        assert file.read_text() == ask("print", "--port", "8090").output
    told.write_text("")
    assert ask("uninstall").exit_code == 0
    assert told.read_text().splitlines() == ["--user disable --now mlx-mcp.service", "--user daemon-reload"]
    assert not file.exists()
    assert "There is no service" in ask("uninstall").output


def test_a_system_that_refuses_is_quoted(system, monkeypatch):
    monkeypatch.setenv("FAILS", "1")
    done = ask("install")
    assert done.exit_code != 0
    assert "The service's file is written" in done.output
