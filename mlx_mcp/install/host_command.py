"""The commands that hosts have for registering a server: safer than to write a file that the host may have open."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mlx_mcp.errors import InstallError
from mlx_mcp.install.hosts import Entry, Host
from mlx_mcp.install.server import Remote, Server

LIMIT_S = 60.0
EDIT_FILE = "Give --edit-file, which has `mlx-mcp` write the host's file itself."


def adding(host: Host, name: str, entry: Entry, server: Server | Remote, project: bool) -> list[str]:
    """The host's command, without its program, that registers a server; empty if it has none for that."""
    scope = "project" if project else "user"
    if host.name == "claude-code":
        return ["mcp", "add-json", "-s", scope, name, json.dumps(entry)]
    if host.name == "gemini":
        if isinstance(server, Remote):
            header = ["-H", f"Authorization: {entry['headers']['Authorization']}"] if "headers" in entry else []
            return ["mcp", "add", "-s", scope, "-t", "http", *header, name, server.url]
        # What follows `--` is not taken for options of its own.
        return ["mcp", "add", "-s", scope, *variables("-e", server), name, server.command, "--", *server.args]
    if project or (isinstance(server, Remote) and server.token):
        return []
    if host.name == "codex":
        if isinstance(server, Remote):
            token = ["--bearer-token-env-var", server.token_variable] if server.token_variable else []
            return ["mcp", "add", name, "--url", server.url, *token]
        return ["mcp", "add", name, *variables("--env", server), "--", server.command, *server.args]
    if host.name == "opencode" and isinstance(server, Server):
        return ["mcp", "add", name, *variables("--env", server), "--", server.command, *server.args]
    if host.name == "vscode":
        return ["--add-mcp", json.dumps({"name": name, **entry})]
    return []


def removing(host: Host, name: str, project: bool) -> list[str]:
    """The host's command, without its program, that takes a server out; empty if it has none for that."""
    scope = "project" if project else "user"
    if host.name in ("claude-code", "gemini"):
        return ["mcp", "remove", "-s", scope, name]
    if host.name == "codex" and not project:
        return ["mcp", "remove", name]
    return []


def program_of(host: Host) -> str | None:
    """Where the host's command is, None if it is not on PATH."""
    return shutil.which(host.program) if host.program else None


def run(command: Sequence[str], folder: Path | None = None) -> None:
    """Carry out a host's command, in a project's folder if one is given.

    Raises:
        InstallError: it fails, cannot be started, or does not end; the text has what it said.
    """
    name = os.path.basename(command[0])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"`{name}` did not end within {LIMIT_S:g} s. {EDIT_FILE}") from error
    except OSError as error:
        raise InstallError(f"`{name}` cannot be started ({error.strerror}). {EDIT_FILE}") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        raise InstallError(f"`{name}` failed with {done.returncode}: {said} Correct that and try again. {EDIT_FILE}")


def variables(flag: str, server: Server) -> list[str]:
    """Settings as options of a command."""
    return [word for name, value in server.env.items() for word in (flag, f"{name}={value}")]
