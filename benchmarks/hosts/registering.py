"""`mlx-mcp install` and `uninstall` with the hosts' own commands, and with none: each host sees what it should."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from benchmarks.hosts.place import COMMANDS, WORK, run
from mlx_mcp.install.hosts import hosts_named

# Each host's command on PATH.
PROGRAMS = {"claude-code": "claude", "codex": "codex", "gemini": "gemini", "opencode": "opencode"}
NAME = "mlx-hosts"


def registers(host: str, by_command: bool) -> str:
    """Registered by its own command, or in its file, a host lists the server; taken out, it lists it no more.

    The home is an empty one. What was written into the file is gone byte for byte afterwards.
    """
    home = WORK / "registering" / host / ("command" if by_command else "file")
    shutil.rmtree(home, ignore_errors=True)
    project = home / "project"
    project.mkdir(parents=True)
    ours = ["--name", NAME, *([] if by_command else ["--edit-file"])]
    kept = {name: os.environ[name] for name in ("HOME", "PATH")}
    os.environ |= {"HOME": str(home), "PATH": f"{COMMANDS}{os.pathsep}{kept['PATH']}"}
    try:
        assert NAME not in listed(host, project)
        before = config(host)
        said = mlx_mcp("install", host, *ours)
        assert ("registered, by" in said) == by_command, said
        assert "does not show it yet" not in said, said
        assert "registered already" in mlx_mcp("install", host, *ours)
        assert NAME in listed(host, project)
        mlx_mcp("install", host, "--model", "embedded", *ours)
        after = config(host)
        assert NAME in listed(host, project)
        untouched = config(host) == after  # by the host, which may write its file whenever it runs
        mlx_mcp("uninstall", host, *ours)
        if not by_command and untouched:
            assert config(host) == before, config(host)
        assert NAME not in listed(host, project)
        version = run(COMMANDS / PROGRAMS[host], "--version").strip().splitlines()[-1]
        return f"{version}{'' if by_command or untouched else ', which wrote its file meanwhile'}"
    finally:
        os.environ |= kept


def mlx_mcp(*words: str) -> str:
    """What this tree's command says."""
    return run(sys.executable, "-m", "mlx_mcp", *words)


def listed(host: str, project: Path) -> str:
    """What a host says of its servers, on either stream."""
    return run("/bin/sh", "-c", '"$0" mcp list 2>&1', COMMANDS / PROGRAMS[host], cwd=project)


def config(host: str) -> bytes | None:
    """What a host's file says, None if it has none."""
    file = hosts_named([host])[0].file(None)
    return file.read_bytes() if file.exists() else None
