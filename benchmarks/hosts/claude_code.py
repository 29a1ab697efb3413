"""Claude Code: `claude mcp add` and `claude mcp list`, without an account."""

from __future__ import annotations

import subprocess
import time
from typing import Any

from benchmarks.hosts.place import HOME, SERVE, TOKEN, WORK, claude_code, run
from mlx_mcp.process.daemon import ask
from mlx_mcp.process.place import user_place

PROJECT = WORK / "project"


def connects(url: str, guarded: str) -> str:
    """It says connected, over stdio, HTTP, and HTTP that asks for a token."""
    PROJECT.mkdir(exist_ok=True)
    (HOME / ".claude.json").unlink(missing_ok=True)
    add = [str(claude_code()), "mcp", "add"]
    run(*add, "local-mlx", "--", *SERVE, cwd=PROJECT)
    run(*add, "-t", "http", "http-mlx", url, cwd=PROJECT)
    run(*add, "-t", "http", "guarded-mlx", guarded, "-H", f"Authorization: Bearer {TOKEN}", cwd=PROJECT)
    all_connected(run(claude_code(), "mcp", "list", cwd=PROJECT))
    return run(claude_code(), "--version").strip()


def two_at_once() -> str:
    """Two processes at once are two windows on one engine, and both say connected."""
    began, hosts = engine_status()["pid"], set[str]()
    for _ in range(10):  # until both are seen in the same moment: a listing is connected for a short time only
        listing = [
            subprocess.Popen([claude_code(), "mcp", "list"], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        most = 0
        while any(process.poll() is None for process in listing):
            state = engine_status()
            assert state["pid"] == began, "another engine"
            windows = [c for c in state["connections"] if c["kind"] == "stdio"]
            most, hosts = max(most, len(windows)), hosts | {c["host"] for c in windows if c["host"]}
            time.sleep(0.005)
        for process in listing:
            assert process.stdout is not None
            all_connected(process.stdout.read())
        if most == 2:
            return f"one engine, which saw {', '.join(sorted(hosts))}"
    raise AssertionError("never two windows at once")


def all_connected(shown: str) -> None:
    """Fail unless a listing says so of all three."""
    assert shown.count("Connected") == 3, shown


def engine_status() -> dict[str, Any]:
    """What the engine says of itself; it must be there."""
    state: Any = ask(user_place(), "status")
    assert state is not None, "there is no engine"
    return dict(state)
