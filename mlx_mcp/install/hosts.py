"""The hosts there are: where each keeps its MCP servers, in which form, and what it can do.

One line of the table below is all that is known of a host's files; tests, pages and examples are made from it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_mcp.errors import InstallError, nearest
from mlx_mcp.install import json_text, toml_text, yaml_text
from mlx_mcp.install.server import Remote, Server

Entry = dict[str, Any]
GOOSE_WORDS = "Local MLX language models"  # it shows them beside the name
LANGUAGES: dict[str, ModuleType] = {".toml": toml_text, ".yaml": yaml_text}


@dataclass(frozen=True)
class Host:
    """A program that has MCP servers.

    Paths begin with `~` or are in the project; `{config}` is the system's folder for applications' settings, and
    `{xdg}` that of commands. The first of `files` that is there is used, or else the first whose folder is, or else
    the first.
    """

    name: str
    title: str
    keys: tuple[str, ...]  # under which of them the servers lie, by name
    files: tuple[str, ...]
    stdio: Callable[[str, Server], Entry]
    http: Callable[[str, Remote, str], Entry] | None  # given the name, the server, and what a header says of the token
    project: tuple[str, ...] = ()  # none: it has no servers of projects
    variable: str = ""  # how a text refers to an environment variable; none: it cannot
    home: str = ""  # an environment variable that says where its folder is
    program: str = ""  # its command on PATH
    apps: tuple[str, ...] = ()  # where its application is

    def file(self, project: Path | None) -> Path:
        """Where it keeps the servers of the user, or those of a project.

        Raises:
            InstallError: it has none of projects.
        """
        if project is not None:
            if not self.project:
                raise InstallError(f"{self.title} has no servers of a project; leave out --project.")
            paths = [project / each for each in self.project]
        else:
            paths = [self.expanded(each) for each in self.files]
        there = [path for path in paths if path.is_symlink() or path.exists()]
        return next(iter(there or [path for path in paths if path.parent.is_dir()] or paths))

    def expanded(self, path: str) -> Path:
        """A path of the table, for this user on this system."""
        folder = os.environ.get(self.home, "") if self.home else ""
        if folder:
            return Path(folder) / Path(path).name
        return Path(os.path.expanduser(path.replace("{config}", applications()).replace("{xdg}", xdg())))

    def language(self, file: Path) -> ModuleType:
        """What reads and writes its file."""
        return LANGUAGES.get(file.suffix, json_text)

    def path(self, name: str) -> tuple[str, ...]:
        """The keys that lead to the server of that name."""
        return (*self.keys, name)

    def entry(self, name: str, server: Server | Remote) -> Entry:
        """What its file says of a server.

        Raises:
            InstallError: it does not connect over HTTP by its file, or cannot refer to a variable.
        """
        if isinstance(server, Server):
            return self.stdio(name, server)
        if self.http is None:
            raise InstallError(
                f"{self.title} takes no HTTP server in its file. Leave out --http: however many windows are open, "
                "they share one engine over stdio too."
            )
        if server.token_variable and not server.token and not self.variable:
            raise InstallError(
                f"{self.title} is not known to read a token from the environment. Give --token-in-clear as well, which "
                f"writes what {server.token_variable} holds into its file."
            )
        token = server.token or self.variable.format(server.token_variable) if server.token_variable else ""
        return self.http(name, server, token and f"Bearer {token}")

    def found(self) -> bool:
        """Whether it is on this machine, as far as its command, its application or its folder tells."""
        if self.program and shutil.which(self.program):
            return True
        files = [self.expanded(each) for each in self.files]
        folders = [file.parent for file in files if file.parent != Path.home()]
        return any(Path(app).exists() for app in self.apps) or any(each.exists() for each in (*files, *folders))


def applications() -> str:
    """Where this system's applications keep their settings."""
    return "~/Library/Application Support" if sys.platform == "darwin" else xdg()


def xdg() -> str:
    """Where commands keep their settings, on macOS too."""
    return os.environ.get("XDG_CONFIG_HOME") or "~/.config"


def plain(name: str, server: Server) -> Entry:
    """Command, arguments and environment: the form that most hosts have from Claude Desktop."""
    return {"command": server.command, "args": [*server.args], **({"env": {**server.env}} if server.env else {})}


def typed(name: str, server: Server) -> Entry:
    """The same with the transport's name before it."""
    return {"type": "stdio", **plain(name, server)}


def timed(name: str, server: Server) -> Entry:
    """The same with how long a call may take, in seconds, as Cline has it."""
    return {**plain(name, server), "disabled": False, "timeout": 600}


def opencode_stdio(name: str, server: Server) -> Entry:
    """One list of command and arguments."""
    env = {"environment": {**server.env}} if server.env else {}
    return {"type": "local", "command": [server.command, *server.args], **env}


def goose_stdio(name: str, server: Server) -> Entry:
    """An extension of Goose; a call may take 600 s."""
    return {
        "name": name,
        "description": GOOSE_WORDS,
        "type": "stdio",
        "enabled": True,
        "cmd": server.command,
        "args": [*server.args],
        "envs": {**server.env},
        "timeout": 600,
    }


def goose_http(name: str, server: Remote, bearer: str) -> Entry:
    """The same over HTTP; which variables its headers may refer to is said beside them."""
    shown = {"headers": {"Authorization": bearer}} if bearer else {}
    keys = {"env_keys": [server.token_variable]} if bearer and not server.token else {}
    return {
        "name": name,
        "description": GOOSE_WORDS,
        "type": "streamable_http",
        "enabled": True,
        "uri": server.url,
        **shown,
        **keys,
        "timeout": 600,
    }


def codex_http(name: str, server: Remote, bearer: str) -> Entry:
    """Codex is told the variable's name, and puts the token into the header itself."""
    if server.token:
        return {"url": server.url, "http_headers": {"Authorization": bearer}}
    variable = {"bearer_token_env_var": server.token_variable} if server.token_variable else {}
    return {"url": server.url, **variable}


def over_http(url: str = "url", type_: str = "") -> Callable[[str, Remote, str], Entry]:
    """An address under this key, after a transport's name where there is one, and before the header of the token."""

    def entry(name: str, server: Remote, bearer: str) -> Entry:
        headers = {"headers": {"Authorization": bearer}} if bearer else {}
        return {**({"type": type_} if type_ else {}), url: server.url, **headers}

    return entry


SERVERS = ("mcpServers",)

HOSTS = (
    Host(
        "claude-code",
        "Claude Code",
        SERVERS,
        ("~/.claude.json",),
        typed,
        over_http(type_="http"),
        project=(".mcp.json",),
        variable="${{{}}}",
        home="CLAUDE_CONFIG_DIR",
        program="claude",
    ),
    Host(
        "claude-desktop",
        "Claude Desktop",
        SERVERS,
        ("{config}/Claude/claude_desktop_config.json",),
        plain,
        None,
        apps=("/Applications/Claude.app",),
    ),
    Host(
        "cursor",
        "Cursor",
        SERVERS,
        ("~/.cursor/mcp.json",),
        plain,
        over_http(),
        project=(".cursor/mcp.json",),
        variable="${{env:{}}}",
        program="cursor",
        apps=("/Applications/Cursor.app",),
    ),
    Host(
        "vscode",
        "VS Code",
        ("servers",),
        ("{config}/Code/User/mcp.json",),
        typed,
        over_http(type_="http"),
        project=(".vscode/mcp.json",),
        variable="${{env:{}}}",
        program="code",
        apps=("/Applications/Visual Studio Code.app",),
    ),
    Host(
        "windsurf",
        "Windsurf",
        SERVERS,
        ("~/.codeium/windsurf/mcp_config.json",),
        plain,
        over_http("serverUrl"),
        variable="${{env:{}}}",
        program="windsurf",
        apps=("/Applications/Windsurf.app",),
    ),
    Host(
        "zed",
        "Zed",
        ("context_servers",),
        ("{xdg}/zed/settings.json",),
        plain,
        over_http(),
        project=(".zed/settings.json",),
        program="zed",
        apps=("/Applications/Zed.app",),
    ),
    Host(
        "codex",
        "Codex CLI",
        ("mcp_servers",),
        ("~/.codex/config.toml",),
        plain,
        codex_http,
        project=(".codex/config.toml",),
        variable="{}",
        home="CODEX_HOME",
        program="codex",
    ),
    Host(
        "gemini",
        "Gemini CLI",
        SERVERS,
        ("~/.gemini/settings.json",),
        plain,
        over_http(type_="http"),
        project=(".gemini/settings.json",),
        variable="${{{}}}",
        program="gemini",
    ),
    Host(
        "opencode",
        "opencode",
        ("mcp",),
        ("{xdg}/opencode/opencode.jsonc", "{xdg}/opencode/opencode.json"),
        opencode_stdio,
        over_http(type_="remote"),
        project=("opencode.json", "opencode.jsonc"),
        variable="{{env:{}}}",
        program="opencode",
    ),
    Host(
        "goose",
        "Goose",
        ("extensions",),
        ("{xdg}/goose/config.yaml",),
        goose_stdio,
        goose_http,
        variable="${{{}}}",
        program="goose",
        apps=("/Applications/Goose.app",),
    ),
    Host(
        "lm-studio",
        "LM Studio",
        SERVERS,
        ("~/.lmstudio/mcp.json", "~/.cache/lm-studio/mcp.json"),
        plain,
        over_http(),
        program="lms",
        apps=("/Applications/LM Studio.app",),
    ),
    Host(
        "cline",
        "Cline",
        SERVERS,
        (
            "~/.cline/data/settings/cline_mcp_settings.json",
            "{config}/Code/User/globalStorage/saoudrizwan.claude-dev/settings/cline_mcp_settings.json",
        ),
        timed,
        over_http(type_="streamableHttp"),
        program="cline",
    ),
)


def hosts_named(names: Sequence[str]) -> list[Host]:
    """The hosts of these names, each once.

    Raises:
        InstallError: there is none of a name.
    """
    by_name = {host.name: host for host in HOSTS}
    for name in names:
        if name not in by_name:
            meant = nearest(name, [each.replace("-", "_") for each in by_name]).replace("_", "-")
            asked = f"Did you mean {meant}? " if meant else ""
            raise InstallError(f"Unknown host: {name!r}. {asked}Give one of: {', '.join(by_name)}.")
    return [by_name[name] for name in dict.fromkeys(names)]
