"""Real hosts against this tree: Claude Code and MCP Inspector, installed from npm, as their users run them.

Run with `make hosts`; needs node and npm. Registers the server in Claude Code with an empty home, over stdio and HTTP,
and has Inspector list and call both tools in both protocol eras. Prints one line per check; fails at the first that
does not hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

WORK = Path("build/hosts").resolve()
PACKAGES = ["@anthropic-ai/claude-code", "@modelcontextprotocol/inspector@2.12.0", "node@24"]
SERVE = [sys.executable, "-m", "mlx_mcp", "serve"]
QUESTION = "The code of Rex is 4096. Bob likes tea. What is the code of Rex?"


def run(*command: str, cwd: Path | None = None) -> str:
    """The command's output; fails with it unless the command ends well."""
    node = WORK / "node_modules" / "node" / "bin"
    env = {**os.environ, "HOME": str(WORK / "home"), "PATH": f"{node}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=180)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def installed(name: str) -> str:
    """The path of a command from npm."""
    return str(WORK / "node_modules" / ".bin" / name)


def check_claude_code(url: str) -> None:
    """`claude mcp add` and `claude mcp list` say connected, for stdio and HTTP."""
    project = WORK / "project"
    project.mkdir(exist_ok=True)
    (WORK / "home" / ".claude.json").unlink(missing_ok=True)
    run(installed("claude"), "mcp", "add", "local-mlx", "--", *SERVE, cwd=project)
    run(installed("claude"), "mcp", "add", "-t", "http", "http-mlx", url, cwd=project)
    shown = run(installed("claude"), "mcp", "list", cwd=project)
    connected = [line for line in shown.splitlines() if "Connected" in line]
    assert len(connected) == 2, shown
    print("Claude Code", run(installed("claude"), "--version").strip(), "connects over stdio and HTTP")


def check_inspector(target: list[str], era: str) -> None:
    """Inspector lists the tools, finds no fault in their schemas, and calls both."""
    inspect = [installed("mcp-inspector"), "--cli", *target, "--protocol-era", era, "--format", "json", "-q"]
    listed = json.loads(run(*inspect, "--method", "tools/list", "--strict"))
    assert [tool["name"] for tool in listed["result"]["tools"]] == ["generate", "list_models"], listed
    asked = ["--tool-name", "generate", "--tool-arg", f"prompt={QUESTION}"]
    answered = json.loads(run(*inspect, "--method", "tools/call", *asked))
    assert answered["result"]["structuredContent"]["text"] == "4096", answered
    models = json.loads(run(*inspect, "--method", "tools/call", "--tool-name", "list_models"))
    assert models["result"]["structuredContent"]["models"][0]["name"] == "embedded", models
    print(f"Inspector lists and calls both tools, {era} era, {'HTTP' if '--transport' in target else 'stdio'}")


def main() -> None:
    """Install the hosts, start an HTTP server, and run every check."""
    (WORK / "home").mkdir(parents=True, exist_ok=True)
    run("npm", "install", "--no-fund", "--no-audit", *PACKAGES, cwd=WORK)
    server = subprocess.Popen([*SERVE, "--http", "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        url = server.stderr.readline().split(" at ")[1].strip()
        check_claude_code(url)
        for era in ("legacy", "modern"):
            check_inspector(SERVE, era)
            check_inspector([url, "--transport", "http"], era)
    finally:
        server.terminate()
        assert server.wait(20) == 0


if __name__ == "__main__":
    main()
