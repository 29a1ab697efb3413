"""Real hosts against this tree: Claude Code and MCP Inspector, installed from npm, as their users run them.

Run with `make hosts`; needs node and npm. Registers the server in Claude Code with an empty home, over stdio and HTTP
with and without a token, also in two processes at once on one engine, and has Inspector list and call the tools in both
protocol eras. All of it runs on one engine process, which is not the user's. Prints one line per check; fails at the
first that does not hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlx_mcp.process.daemon import ask, stop
from mlx_mcp.process.place import user_place

WORK = Path("build/hosts").resolve()
PACKAGES = ["@anthropic-ai/claude-code", "@modelcontextprotocol/inspector@2.12.0", "node@24"]
SERVE = [sys.executable, "-m", "mlx_mcp", "serve"]
TOKEN = "for-hosts"
TOOLS = [
    "generate",
    "generate_batch",
    "create_session",
    "fork_session",
    "persist_session",
    "list_sessions",
    "close_session",
    "list_models",
]
FACTS = "The code of Rex is 4096. The code of Kim is 771."
QUESTION = "What is the code of Rex?"


def run(*command: str, cwd: Path | None = None) -> str:
    """The command's output; fails with it unless the command ends well."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=180)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment() -> dict[str, str]:
    """Of a user who has nothing but node."""
    node = WORK / "node_modules" / "node" / "bin"
    return {**os.environ, "HOME": str(WORK / "home"), "PATH": f"{node}:{os.environ['PATH']}"}


def installed(name: str) -> str:
    """The path of a command from npm."""
    return str(WORK / "node_modules" / ".bin" / name)


def served(**settings: str) -> tuple[subprocess.Popen[str], str]:
    """An HTTP server with settings for its environment, and its address."""
    env = {**os.environ, **settings}
    server = subprocess.Popen([*SERVE, "--http", "--port", "0"], stderr=subprocess.PIPE, text=True, env=env)
    assert server.stderr is not None
    return server, server.stderr.readline().split(" at ")[1].strip()


def check_claude_code(url: str, guarded: str) -> None:
    """`claude mcp add` and `claude mcp list` say connected, for stdio and HTTP, also where a token is asked for."""
    project = WORK / "project"
    project.mkdir(exist_ok=True)
    (WORK / "home" / ".claude.json").unlink(missing_ok=True)
    add = [installed("claude"), "mcp", "add"]
    run(*add, "local-mlx", "--", *SERVE, cwd=project)
    run(*add, "-t", "http", "http-mlx", url, cwd=project)
    run(*add, "-t", "http", "guarded-mlx", guarded, "-H", f"Authorization: Bearer {TOKEN}", cwd=project)
    shown = run(installed("claude"), "mcp", "list", cwd=project)
    connected = [line for line in shown.splitlines() if "Connected" in line]
    assert len(connected) == 3, shown
    print("Claude Code", run(installed("claude"), "--version").strip(), "connects over stdio, HTTP, HTTP with a token")


def check_two_at_once() -> None:
    """Two Claude Code processes at once are two windows on one engine, and both say connected."""
    began, hosts = engine_status()["pid"], set[str]()
    for _ in range(10):  # until both are seen in the same moment: a listing is connected for a short time only
        listing = [
            subprocess.Popen(
                [installed("claude"), "mcp", "list"],
                cwd=WORK / "project",
                env=environment(),
                stdout=subprocess.PIPE,
                text=True,
            )
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
            shown = process.stdout.read()
            assert shown.count("Connected") == 3, shown
        if most == 2:
            print("Two Claude Code processes at once: both connected, one engine, which saw", *sorted(hosts))
            return
    raise AssertionError("never two windows at once")


def engine_status() -> dict[str, Any]:
    """What the engine says of itself; it must be there."""
    state: Any = ask(user_place(), "status")
    assert state is not None, "there is no engine"
    return dict(state)


class Inspector:
    """MCP Inspector's CLI against one target; every call is a client of its own."""

    def __init__(self, target: list[str], era: str) -> None:
        self._command = [installed("mcp-inspector"), "--cli", *target, "--protocol-era", era, "--format", "json", "-q"]

    def list(self) -> list[str]:
        """The tools' names; fails if there is a fault in a schema."""
        listed = json.loads(run(*self._command, "--method", "tools/list", "--strict"))
        return [tool["name"] for tool in listed["result"]["tools"]]

    def call(self, tool: str, **arguments: Any) -> Any:
        """What a tool returns."""
        given = [f"{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in arguments.items()]
        pairs = [part for pair in given for part in ("--tool-arg", pair)]
        called = run(*self._command, "--method", "tools/call", "--tool-name", tool, *pairs)
        return json.loads(called)["result"]["structuredContent"]


def check_inspector(target: list[str], era: str) -> None:
    """Inspector lists the tools, finds no fault in their schemas, and calls what needs nothing from before."""
    inspector = Inspector(target, era)
    assert inspector.list() == TOOLS
    assert inspector.call("generate", prompt=f"{FACTS} {QUESTION}")["text"] == "4096"
    assert inspector.call("list_models")["models"][0]["name"] == "embedded"
    batch = inspector.call("generate_batch", prompts=[QUESTION, "What is the code of Kim?"], system=FACTS)
    assert [result["text"] for result in batch["results"]] == ["4096", "771"], batch
    print(f"Inspector lists and calls the tools, {era} era, {'HTTP' if '--transport' in target else 'stdio'}")


def check_sessions(target: list[str], era: str) -> None:
    """A session goes on from client to client until it is closed."""
    inspector = Inspector(target, era)
    made = inspector.call("create_session", messages=[{"role": "user", "content": FACTS}], name=era, ttl_s=60)
    forks = inspector.call("fork_session", session=era, names=[f"{era}-fork"])
    assert forks["tokens"] == made["tokens"], forks
    answer = inspector.call("generate", session=f"{era}-fork", prompt=QUESTION)
    assert (answer["text"], answer["cached_tokens"]) == ("4096", made["tokens"]), answer
    assert len(inspector.call("list_sessions")["sessions"]) == 2
    assert len(inspector.call("close_session", all=True)["closed"]) == 2
    print(f"Inspector makes, forks, asks, lists and closes sessions, {era} era, with a token")


def main() -> None:
    """Install the hosts, start HTTP servers, and run every check."""
    (WORK / "home").mkdir(parents=True, exist_ok=True)
    # The engine's place follows from the home, which is all that some hosts pass on.
    os.environ["HOME"] = str(WORK / "home")
    for name in ("MLX_MCP_STATE_DIR", "XDG_STATE_HOME"):
        os.environ.pop(name, None)
    run("npm", "install", "--no-fund", "--no-audit", *PACKAGES, cwd=WORK)
    (server, url), (guarded_server, guarded) = served(), served(MLX_MCP_TOKEN=TOKEN)
    try:
        check_claude_code(url, guarded)
        check_two_at_once()
        for era in ("legacy", "modern"):
            check_inspector(SERVE, era)
            check_inspector([url, "--transport", "http"], era)
            check_sessions([guarded, "--transport", "http", "--header", f"Authorization: Bearer {TOKEN}"], era)
    finally:
        for process in (server, guarded_server):
            process.terminate()
            assert process.wait(20) == 0
        stop(user_place(), 20)


if __name__ == "__main__":
    main()
