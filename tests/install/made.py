"""The files of claude-integration/ and docs/hosts/ that are made from the code: `python -m tests.install.made`.

They show `/usr/local/bin/mlx-mcp` where a user's own path would be.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from mlx_mcp import __version__
from mlx_mcp.install.hosts import HOSTS, Host
from mlx_mcp.install.links import LINKED, link_of
from mlx_mcp.install.registration import whole_entry
from mlx_mcp.install.server import Remote, Server

ROOT = Path(__file__).parent.parent.parent
SERVER = Server("/usr/local/bin/mlx-mcp", ("serve",))
REMOTE = Remote("http://127.0.0.1:8080/mcp", "MLX_MCP_TOKEN")
OPEN_REMOTE = Remote("http://127.0.0.1:8080/mcp")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWNER = {"name": "mlx-mcp", "url": "https://github.com/mlx-mcp"}
REPOSITORY = PROJECT["urls"]["Documentation"].removesuffix("#readme")
REGISTRY_NAME = "io.github.mlx-mcp/mlx-mcp"
SHORT = "Local MLX language models for agents: private, many calls at once, every context shared."
TOOLS = (
    "generate generate_batch deliberate get_result cancel create_session fork_session persist_session list_sessions "
    "close_session sandbox_run reason_over list_models load_model unload_model count_tokens"
).split()
MADE = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODEL = {
    "type": "string",
    "title": "Model",
    "description": "A hub id, as mlx-community/Qwen3-4B-4bit, or a folder. Empty: the small built-in model.",
    "required": False,
    "default": "",
}


def manifests() -> dict[str, Any]:
    """The JSON files that say what this is to Claude Code, to Claude Desktop and to the registry."""
    shared = {"version": __version__, "license": PROJECT["license"], "keywords": PROJECT["keywords"]}
    shared |= {"description": SHORT, "author": OWNER, "homepage": REPOSITORY}
    plugin = {"name": "mlx", "repository": REPOSITORY, **shared}
    return {
        "claude-integration/plugin/.claude-plugin/plugin.json": plugin,
        "claude-integration/plugin/.mcp.json": {"mcpServers": {"mlx": {"command": "mlx-mcp", "args": ["serve"]}}},
        ".claude-plugin/marketplace.json": {
            "name": "mlx-mcp",
            "description": SHORT,
            "owner": OWNER,
            "plugins": [{"name": "mlx", "description": SHORT, "source": "./claude-integration/plugin"}],
        },
        "claude-integration/mcpb/manifest.json": {
            "manifest_version": "0.4",
            "name": "mlx-mcp",
            "display_name": "Local MLX models",
            "repository": {"type": "git", "url": REPOSITORY},
            "documentation": PROJECT["urls"]["Documentation"],
            "server": {
                "type": "uv",
                "entry_point": "server.py",
                "mcp_config": {
                    "command": "uv",
                    "args": ["run", "--directory", "${__dirname}", "server.py"],
                    "env": {"MLX_MCP_MODEL": "${user_config.model}"},
                },
            },
            "tools_generated": True,
            "user_config": {"model": MODEL},
            "compatibility": {"platforms": ["darwin", "linux"], "runtimes": {"python": PROJECT["requires-python"]}},
            **shared,
        },
        "claude-integration/server.json": {
            "$schema": "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json",
            "name": REGISTRY_NAME,
            "title": "mlx-mcp",
            "description": SHORT,
            "repository": {"url": REPOSITORY, "source": "github"},
            "version": __version__,
            "packages": [
                {
                    "registryType": "pypi",
                    "identifier": PROJECT["name"],
                    "version": __version__,
                    "runtimeHint": "uvx",
                    "transport": {"type": "stdio"},
                    "packageArguments": [{"type": "positional", "value": "serve"}],
                    "environmentVariables": [
                        {"name": "MLX_MCP_MODEL", "description": MODEL["description"], "isRequired": False}
                    ],
                }
            ],
        },
    }


def agent_tools() -> str:
    """The tools of the sub-agent, under the names that they have in the plugin and where the server is registered."""
    names = [f"{prefix}{tool}" for prefix in ("mcp__plugin_mlx_mlx__", "mcp__mlx__") for tool in TOOLS]
    return ", ".join([*names, "Read", "Grep", "Glob"])


def examples() -> dict[str, str]:
    """An entry for each host, as its file has it."""
    suffix = {host.name: Path(host.files[0]).suffix for host in HOSTS}
    return {
        f"claude-integration/mcp-config/{host.name}{suffix[host.name]}": whole_entry(
            host, "mlx", host.entry("mlx", SERVER)
        )
        for host in HOSTS
    }


def fenced(host: Host, server: Server | Remote) -> str:
    """An entry in a fence."""
    language = {".toml": "toml", ".yaml": "yaml"}.get(Path(host.files[0]).suffix, "json")
    return f"```{language}\n{whole_entry(host, 'mlx', host.entry('mlx', server))}```\n"


def parts(host: Host) -> dict[str, str]:
    """What of a host's page is made from the code."""
    folder = f", `{host.home}` says another folder" if host.home else ""
    files = " or ".join(f"`{path.replace('{xdg}', '~/.config')}`" for path in host.files)
    files = files.replace("{config}", "~/Library/Application Support") + (
        f", on Linux {files.replace('{config}', '~/.config')}" if "{config}" in files else ""
    )
    projects = f"; of a project: {' or '.join(f'`{path}`' for path in host.project)}" if host.project else ""
    made = {"file": f"The file is {files}{folder}{projects}.\n", "stdio": fenced(host, SERVER)}
    if host.http:
        made["http"] = fenced(host, REMOTE if host.variable else OPEN_REMOTE)
    if host.name in LINKED:
        made["link"] = f"```\n{link_of(host, 'mlx', Server('uvx', ('mlx-mcp', 'serve')))}\n```\n"
    return made


def filled(text: str, host: Host) -> str:
    """A page with its made parts put in anew."""
    made = parts(host)
    return MADE.sub(lambda found: found[1] + made[found[2]] + found[3], text)


def files() -> dict[str, str]:
    """All that is made, by path below the root."""
    texts = {path: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for path, value in manifests().items()}
    texts |= examples()
    agent = "claude-integration/plugin/agents/local-model.md"
    texts[agent] = re.sub(r"^tools: .*$", f"tools: {agent_tools()}", (ROOT / agent).read_text(), flags=re.MULTILINE)
    for host in HOSTS:
        page = f"docs/hosts/{host.name}.md"
        texts[page] = filled((ROOT / page).read_text(), host)
    return texts


if __name__ == "__main__":
    for path, text in files().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
