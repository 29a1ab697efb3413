"""Claude Code of npm, driven by a scripted model, on this tree's server: `make test-claude-code`, which CI runs.

Nothing here is collected unless this folder is named on pytest's command line. Where npm brought no Claude Code, every
test is skipped, and pytest counts them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from benchmarks.hosts.place import claude_code
from mlx_mcp.process.place import Place
from tests.hosts.claude_code import WAIT_S, ClaudeCode, Terminal
from tests.hosts.endpoint import Json, serving
from tests.process.windows import state_folder

HERE = Path(__file__).parent
TIMEOUT_S = 2.0
ERAS = {"legacy": "2025-11-25", "auto": "2026-07-28"}  # how Claude Code is told to begin; what it then speaks


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    named = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return None if any(path == HERE or HERE in path.parents for path in named) else True


@pytest.fixture(scope="session")
def program() -> Path:
    """Claude Code."""
    try:
        return claude_code()
    except FileNotFoundError:
        pytest.skip("Claude Code is not there: `make test-claude-code` installs it from npm")


@pytest.fixture(scope="session")
def engine() -> Iterator[tuple[Place, dict[str, str]]]:
    """One engine for all tests, as one user has; where it is, and the environment that leads there."""
    with state_folder(MLX_MCP_MAX_SSD_BYTES="0") as (place, env):
        yield place, env


@pytest.fixture(scope="session")
def place(engine: tuple[Place, dict[str, str]]) -> Place:
    return engine[0]


@contextmanager
def served(transport: str, env: dict[str, str]) -> Iterator[Json]:
    """The entry of a server in Claude Code's configuration; over HTTP it is there within the block."""
    serve = [sys.executable, "-m", "mlx_mcp", "serve"]
    if transport == "stdio":
        own = {name: value for name, value in env.items() if name.startswith("MLX_MCP_")}
        yield {"type": "stdio", "command": serve[0], "args": serve[1:], "env": own}
        return
    with subprocess.Popen([*serve, "--http", "--port", "0"], env=env, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = server.stderr.readline()
        address = re.search(r"http://\S+/mcp", said)
        assert address, said
        try:
            yield {"type": "http", "url": address[0]}
        finally:
            server.terminate()
            server.communicate(timeout=WAIT_S)


@pytest.fixture(scope="module", params=["stdio", "http"])
def entry(request: pytest.FixtureRequest, engine: tuple[Place, dict[str, str]]) -> Iterator[Json]:
    with served(request.param, engine[1]) as entry:
        yield entry


@pytest.fixture(scope="module", params=ERAS)
def era(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Host = TypeVar("Host", ClaudeCode, Terminal)


@contextmanager
def hosting(kind: type[Host], program: Path, entry: Json, home: Path, **settings: str) -> Iterator[Host]:
    """Claude Code with our server and an endpoint of its own, within the block."""
    with serving() as endpoint:
        host = kind(program, endpoint, entry, home / "home", **settings)
        try:
            yield host
        finally:
            host.close()


@pytest.fixture(scope="module")
def claude(program: Path, entry: Json, era: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClaudeCode]:
    """Claude Code in one era and over one transport, for all tests of a file."""
    home = tmp_path_factory.mktemp("host")
    with hosting(ClaudeCode, program, entry, home, MCP_PROTOCOL_NEGOTIATION=era) as host:
        yield host


@pytest.fixture
def impatient(program: Path, entry: Json, era: str, tmp_path: Path) -> Iterator[ClaudeCode]:
    """Another that gives calls up after TIMEOUT_S."""
    cut_ms = str(round(1000 * TIMEOUT_S))
    with hosting(ClaudeCode, program, entry, tmp_path, MCP_PROTOCOL_NEGOTIATION=era, MCP_TOOL_TIMEOUT=cut_ms) as host:
        yield host


@pytest.fixture
def terminal(program: Path, entry: Json, era: str, tmp_path: Path) -> Iterator[Terminal]:
    """Claude Code in a terminal."""
    with hosting(Terminal, program, entry, tmp_path, MCP_PROTOCOL_NEGOTIATION=era) as host:
        yield host
