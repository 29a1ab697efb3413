"""What is made from the code says what the code says, and is whole: pages, entries, manifests, the plugin, setup.sh."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mlx_mcp.api.mcp.tools import make_tools
from mlx_mcp.cli.main import app
from mlx_mcp.install.hosts import HOSTS
from mlx_mcp.install.links import LINKED
from mlx_mcp.install.server import is_own
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from tests.effort import rare_ones_slow
from tests.fakes import fake_client
from tests.install.made import REGISTRY_NAME, ROOT, TOOLS, files

HERE = ROOT / "claude-integration"
PLUGIN = HERE / "plugin"
PAGES = ROOT / "docs" / "hosts"
MARKDOWN = [*PLUGIN.glob("*/*.md"), *PLUGIN.glob("skills/*/SKILL.md")]


@pytest.mark.parametrize("path", files())
def test_a_file_that_is_made_is_as_the_code_makes_it(path):
    assert (ROOT / path).read_text() == files()[path], "run: python -m tests.install.made"


def test_every_host_has_a_page_that_says_how_to_register_limit_and_remove():
    table = (PAGES / "README.md").read_text()
    for host in HOSTS:
        page = (PAGES / f"{host.name}.md").read_text()
        for words in (
            f"mlx-mcp install {host.name}",
            f"mlx-mcp uninstall {host.name}",
            "## Time limits",
            "made: stdio",
        ):
            assert words in page, f"{host.name}: {words}"
        row = next(line for line in table.splitlines() if f"({host.name}.md)" in line)
        _, _, command, projects, token, link, _ = (cell.strip() for cell in row.split("|"))
        assert command == f"`mlx-mcp install {host.name}`"
        assert (projects == "yes", link == "yes") == (bool(host.project), host.name in LINKED)
        assert token == ("by a reference" if host.variable else "in clear" if host.http else "")
    assert {path.stem for path in PAGES.glob("*.md")} == {host.name for host in HOSTS} | {"README"}


@pytest.mark.parametrize("path", [*PAGES.glob("*.md"), HERE / "README.md", PLUGIN / "README.md"], ids=lambda p: p.stem)
def test_every_command_and_link_on_a_page_leads_somewhere(path, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for line in re.findall(r"^mlx-mcp (?:un)?install [a-z].*$", text, re.MULTILINE):
        done = CliRunner().invoke(app, [*line.split()[1:], "--dry-run"])
        assert done.exit_code == 0, f"{line}: {done.output}"


def test_the_examples_of_entries_start_this_server():
    for host in HOSTS:
        (path,) = HERE.glob(f"mcp-config/{host.name}.*")
        said = host.language(path).load(path.read_text())
        for key in host.path("mlx"):
            said = said[key]
        assert is_own(said)


def test_the_names_of_tools_in_the_plugin_are_those_of_the_server():
    assert {tool.name for tool in make_tools(Service(fake_client(), Registry(None)))} <= set(TOOLS)
    for path in [*MARKDOWN, HERE / "CLAUDE.md"]:
        for word in re.findall(r"`([a-z]+_[a-z_]+)`", path.read_text()):
            assert word in {*TOOLS, "json_schema", "finish_reason", "max_tokens", "result_id"}, f"{path.name}: {word}"


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_what_the_plugin_offers_says_when_to_use_it(path):
    head = yaml.safe_load(path.read_text().split("---\n")[1])
    assert 20 < len(head["description"]) < 1024
    if "name" in head:
        assert re.fullmatch(r"[a-z0-9-]{1,64}", head["name"])


def test_the_marketplace_finds_the_plugin():
    market = json.loads((ROOT / ".claude-plugin" / "marketplace.json").read_text())
    (plugin,) = market["plugins"]
    manifest = json.loads((ROOT / plugin["source"] / ".claude-plugin" / "plugin.json").read_text())
    assert (market["name"], manifest["name"]) == ("mlx-mcp", "mlx")  # as `claude plugin install mlx@mlx-mcp` has them


def test_the_bundle_says_what_its_form_requires_and_starts_the_file_beside_it():
    said = json.loads((HERE / "mcpb" / "manifest.json").read_text())
    assert {"manifest_version", "name", "version", "description", "author", "server"} <= said.keys()
    assert said["server"]["type"] == "uv"
    assert (HERE / "mcpb" / said["server"]["entry_point"]).is_file()
    assert said["server"]["entry_point"] in said["server"]["mcp_config"]["args"]


def test_the_registry_finds_its_name_in_the_readme():
    assert f"<!-- mcp-name: {REGISTRY_NAME} -->" in (ROOT / "README.md").read_text()
    said = json.loads((HERE / "server.json").read_text())
    assert len(said["description"]) <= 100
    assert re.fullmatch(r"[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+", said["name"])


class Home:
    """A user's home for setup.sh, with this tree's mlx-mcp on PATH and no claude."""

    def __init__(self, folder):
        self.folder, self.rules = folder, folder / ".claude" / "CLAUDE.md"

    def setup(self, *options, status=0, **env):
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        env = {"HOME": str(self.folder), "PATH": path, **env}
        command = ["bash", str(HERE / "setup.sh"), *options]
        done = subprocess.run(
            command, env=env, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def seen(self):
        kept = self.folder / ".local"
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and not path.is_relative_to(kept)
        }


RULES = [None, b"", b"Be kind.\n", b"Be kind.", b"a\r\n\r\nb\r\n\r\n"]


@pytest.mark.parametrize("rules", rare_ones_slow(RULES, RULES, [None, b"Be kind."]))
def test_setup_twice_is_as_once_and_its_uninstall_leaves_everything_as_it_was(tmp_path, rules):
    home = Home(tmp_path)
    (tmp_path / ".claude.json").write_bytes(b'{"numStartups":1}')
    home.rules.parent.mkdir()
    if rules is not None:
        home.rules.write_bytes(rules)
    before = home.seen()
    home.setup("--model", "some/model")
    after = home.seen()
    assert json.loads(after[".claude.json"])["mcpServers"]["mlx"]["args"] == ["serve", "--model", "some/model"]
    assert (HERE / "CLAUDE.md").read_bytes() in after[".claude/CLAUDE.md"]
    assert after[".claude/CLAUDE.md"].startswith(rules or b"")
    home.setup("--model", "some/model")
    assert home.seen() == after
    copies = tmp_path / ".local" / "state" / "mlx-mcp" / "before"
    assert copies.parent.stat().st_mode & 0o777 == 0o700  # or no engine starts in it
    kept = {path.name: path.read_bytes() for path in copies.iterdir()}
    assert kept == {Path(name).name: data for name, data in before.items()}
    home.setup("--uninstall")
    assert home.seen() == before


def test_setup_keeps_what_was_added_to_the_rules_meanwhile(tmp_path):
    home = Home(tmp_path)
    home.setup()
    home.rules.write_text(home.rules.read_text() + "Mine.\n")
    home.setup("--uninstall")
    assert home.rules.read_text() == "Mine.\n"


def test_setup_says_what_to_do_where_something_is_missing(tmp_path):
    home = Home(tmp_path)
    assert "uv tool install" in home.setup(status=2, PATH="/usr/bin:/bin")
    assert "Leave out --plugin" in home.setup("--plugin", status=2)
    assert "--uninstall takes everything" in home.setup("--help")
    assert not (tmp_path / ".claude.json").exists()


def test_setup_with_the_plugin_has_claude_install_it_and_registers_no_second_server(tmp_path):
    home, calls = Home(tmp_path), tmp_path / "bin" / "calls"
    calls.parent.mkdir()
    claude = calls.with_name("claude")
    claude.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    claude.chmod(0o755)
    path = f"{calls.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"
    home.setup("--plugin", PATH=path)
    assert calls.read_text().splitlines() == [f"plugin marketplace add {ROOT}", "plugin install mlx@mlx-mcp"]
    assert "or leave out --plugin" in home.setup("--plugin", "--model", "x", status=2, PATH=path)
    assert not (tmp_path / ".claude.json").exists()
    calls.unlink()
    home.setup("--uninstall", PATH=path)
    assert calls.read_text().splitlines() == ["plugin uninstall mlx@mlx-mcp", "plugin marketplace remove mlx-mcp"]


def test_the_bundles_entry_serves(tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "MLX_MCP_STATE_DIR": str(tmp_path / "state"), "MLX_MCP_MODEL": ""}
    command = [sys.executable, str(HERE / "mcpb" / "server.py"), "--no-such-option"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "Usage: mlx-mcp serve" in done.stderr
