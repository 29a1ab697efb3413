"""`mlx-mcp install` and `uninstall` as a user runs them, with hosts' own commands played by scripts."""

import json
import os
import sys
from base64 import b64decode
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from typer.testing import CliRunner

from mlx_mcp.cli.main import app
from mlx_mcp.install import host_command
from mlx_mcp.install.hosts import HOSTS
from mlx_mcp.install.server import command_here, is_own

# A host's command: writes down what it was told, and does as Claude Code does.
FAKE = """#!{python}
import json, os, sys
from pathlib import Path
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
file = Path.home() / ".claude.json"
if sys.argv[1:3] in (["mcp", "add-json"], ["mcp", "remove"]) and "claude" in sys.argv[0]:
    data = json.loads(file.read_text()) if file.exists() else {{}}
    servers = data.setdefault("mcpServers", {{}})
    if sys.argv[2] == "remove":
        del servers[sys.argv[-1]]
    elif sys.argv[5] in servers:
        sys.exit(f"MCP server {{sys.argv[5]}} already exists")
    else:
        servers[sys.argv[5]] = json.loads(sys.argv[6])
    file.write_text(json.dumps(data))
sys.exit(os.environ.get("FAKE_ERROR"))
"""


class Home:
    """A user with an empty home, and with the commands of some hosts on PATH."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.bin, self.calls = folder / "home", folder / "bin", folder / "calls"
        for each in (self.folder, self.bin):
            each.mkdir()
        for name in ("XDG_CONFIG_HOME", "CODEX_HOME", "CLAUDE_CONFIG_DIR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(self.folder))
        monkeypatch.setenv("CALLS", str(self.calls))
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setenv("MLX_MCP_STATE_DIR", str(folder / "state"))
        monkeypatch.chdir(self.folder)

    def give(self, program):
        script = self.bin / program
        script.write_text(FAKE.format(python=sys.executable))
        script.chmod(0o755)

    def called(self):
        calls = [json.loads(line) for line in self.calls.read_text().splitlines()] if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return calls

    def run(self, *words, status=0):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == status, done.output
        return done.output

    def json(self, name):
        return json.loads((self.folder / name).read_text())

    def files(self):
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    return Home(tmp_path, monkeypatch)


def test_all_hosts_come_and_go_in_one_command_each(home):
    names = [host.name for host in HOSTS]
    said = home.run("install", *names)
    assert said.count("is registered, in") == len(HOSTS)
    assert len([name for name in home.files() if name.endswith((".json", ".jsonc", ".toml", ".yaml"))]) == len(HOSTS)
    assert home.run("install", *names).count("is registered already") == len(HOSTS)
    assert home.run("uninstall", *names).count("was taken out of") == len(HOSTS)
    assert home.files() == []
    assert home.run("uninstall", *names).count("is not registered") == len(HOSTS)


def test_without_a_host_all_are_listed_with_what_is_known_of_them(home):
    (home.folder / ".cursor").mkdir()
    (home.folder / ".gemini").mkdir()
    (home.folder / ".gemini" / "settings.json").write_text('{"mcpServers": {"mlx": {"command": "other"}}}')
    (home.folder / ".codex").mkdir()
    (home.folder / ".codex" / "config.toml").write_text("a = ")
    home.give("claude")
    home.run("install", "zed", "claude-code", "--edit-file")
    listed = {row["host"]: row for row in json.loads(home.run("install", "--json"))}
    assert list(listed) == [host.name for host in HOSTS]
    assert {name for name, row in listed.items() if row["found"]} == {"cursor", "gemini", "codex", "claude-code", "zed"}
    assert {name for name, row in listed.items() if row["registered"] == "yes"} == {"zed", "claude-code"}
    assert listed["gemini"]["registered"] == "another's"
    assert "line 1, column 5" in listed["codex"]["registered"]
    assert "\nzed" in home.run("uninstall")


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_what_is_written_is_absolute_and_carries_model_and_settings_but_none_of_the_shell(home, monkeypatch, host):
    monkeypatch.setenv("MLX_MCP_KV_BITS", "4")
    (home.folder / "model").mkdir()
    home.run("install", host.name, "--model", "model", "-e", "HF_HUB_OFFLINE=1")
    said = host.language(host.file(None)).load(host.file(None).read_text())
    for key in host.path("mlx"):
        said = said[key]
    assert is_own(said)
    words = (
        said["command"]
        if isinstance(said.get("command"), list)
        else [said.get("command") or said["cmd"], *said["args"]]
    )
    assert os.path.isabs(words[0])
    assert words[-3:] == ["serve", "--model", str(home.folder / "model")]
    assert next(said[key] for key in ("env", "envs", "environment") if key in said) == {"HF_HUB_OFFLINE": "1"}


def test_a_dry_run_shows_the_change_and_does_nothing(home):
    (home.folder / ".cursor").mkdir()
    (home.folder / ".cursor" / "mcp.json").write_text('{\n  "mcpServers": {\n    "a": {}\n  }\n}\n')
    before = home.files()
    shown = home.run("install", "cursor", "--dry-run")
    assert '-    "a": {}\n+    "a": {},\n+    "mlx": {' in shown
    home.give("claude")
    assert "claude mcp add-json -s user mlx '{" in home.run("install", "claude-code", "--dry-run")
    assert (home.files(), home.called()) == (before, [])
    home.run("install", "cursor")
    assert '-    "mlx": {' in home.run("uninstall", "cursor", "--dry-run")
    assert "mlx" in home.json(".cursor/mcp.json")["mcpServers"]


def test_the_entry_alone_is_printed_to_paste(home):
    assert json.loads(home.run("install", "vscode", "--print"))["servers"]["mlx"]["type"] == "stdio"
    assert home.run("install", "codex", "--print", "--name", "a b").startswith('[mcp_servers."a b"]\ncommand = "/')
    assert home.run("install", "goose", "--print").startswith("extensions:\n  mlx:\n    name: mlx\n    description: ")
    assert home.files() == []


def test_projects_have_files_of_their_own(home):
    names = [host.name for host in HOSTS if host.project]
    home.run("install", "--project", *names)
    assert set(home.files()) >= {
        ".mcp.json",
        ".cursor/mcp.json",
        ".vscode/mcp.json",
        ".codex/config.toml",
        "opencode.json",
    }
    assert {row["registered"] for row in json.loads(home.run("install", "--project", "--json"))} == {"yes"}
    home.run("uninstall", "--project", *names)
    assert home.files() == []
    assert "leave out --project" in home.run("install", "--project", "goose", status=2)


def test_hosts_that_read_variables_get_a_reference_and_the_others_the_token_only_where_asked(home, monkeypatch):
    monkeypatch.setenv("TOK", "s3cret")
    url = ["--http", "http://127.0.0.1:8080/mcp"]
    for host in HOSTS:
        if host.http is None:
            assert "share one engine over stdio" in home.run("install", host.name, *url, status=2)
            continue
        assert "8080" in home.run("install", host.name, *url, "--print")
        if host.variable:
            shown = home.run("install", host.name, *url, "--token-env", "TOK", "--print")
            assert "TOK" in shown
            assert "s3cret" not in shown
        else:
            refused = home.run("install", host.name, *url, "--token-env", "TOK", "--print", status=2)
            assert "Give --token-in-clear as well" in refused
        assert "s3cret" in home.run("install", host.name, *url, "--token-env", "TOK", "--token-in-clear", "--print")


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (["cursorr"], "Did you mean cursor? Give one of: claude-code"),
        (["cursor", "--env", "A"], "it must be NAME=VALUE, as MLX_MCP_KV_BITS=8"),
        (["cursor", "--env", "A=\udcff"], "is not UTF-8, and hosts' files are. Give it another name"),
        (["cursor", "--env", "=b"], "NAME=VALUE"),
        (["cursor", "--token-env", "A"], "--token-env and --token-in-clear go with --http: give its URL"),
        (["cursor", "--http", "localhost:8080"], "it must be a URL, as http://127.0.0.1:8080/mcp"),
        (["cursor", "--http", "http://x/mcp", "--model", "y"], "leave them out where --http has a URL"),
        (
            ["cursor", "--http", "http://x/mcp", "--token-in-clear"],
            "give --token-env, the name of a variable that holds it",
        ),
        (["zed", "--link"], "has no links that register a server. Leave out --link; these have: cursor"),
        (
            ["goose", "--link", "--env", "A=b"],
            "A link of Goose carries no settings. Use `mlx-mcp install goose` without --link",
        ),
        (["goose", "--link", "--http", "http://x/mcp", "--token-env", "A"], "A link of Goose carries no token"),
    ],
)
def test_a_mistake_is_refused_with_the_next_step(home, words, step):
    assert step in home.run("install", *words, status=2)
    assert home.files() == []


def test_one_host_that_fails_does_not_keep_the_others_from_being_registered(home):
    (home.folder / ".cursor").mkdir()
    (home.folder / ".cursor" / "mcp.json").write_text("{")
    said = home.run("install", "cursor", "zed", status=2)
    assert "line 1, column 2: " in said
    assert "Nothing was changed. Correct that, or edit it by hand" in said
    assert "mlx" in home.json(".config/zed/settings.json")["context_servers"]


def test_links_carry_the_entry(home):
    def words(*options):
        return parse_qs(urlsplit(home.run("install", *options, "--link").strip()).query)

    for host in ("cursor", "lm-studio"):
        said = words(host)
        assert said["name"] == ["mlx"]
        assert is_own(json.loads(b64decode(said["config"][0])))
    link = home.run("install", "vscode", "--link").strip()
    assert link.startswith("vscode:mcp/install?")
    assert json.loads(unquote(link.partition("?")[2])).items() >= {"name": "mlx", "type": "stdio"}.items()
    said = words("goose", "--model", "a/b")
    assert said["cmd"] == ["uvx"]
    assert said["arg"] == ["mlx-mcp", "serve", "--model", "a/b"]
    assert words("goose", "--http", "http://x/mcp")["url"] == ["http://x/mcp"]


def test_a_hosts_own_command_is_called_where_it_is_on_path(home):
    for program in ("claude", "codex", "gemini", "opencode", "code"):
        home.give(program)
    home.run("install", "claude-code", "codex", "gemini", "opencode", "vscode", "-e", "A=b", "--model", "x")
    command, args = command_here()
    started = [*args, "--model", "x"]
    entry = {"type": "stdio", "command": command, "args": started, "env": {"A": "b"}}
    claude, codex, gemini, opencode, code = home.called()
    assert claude[:6] == ["claude", "mcp", "add-json", "-s", "user", "mlx"]
    assert json.loads(claude[6]) == entry
    assert codex == ["codex", "mcp", "add", "mlx", "--env", "A=b", "--", command, *started]
    assert gemini == ["gemini", "mcp", "add", "-s", "user", "-e", "A=b", "mlx", command, "--", *started]
    assert opencode == ["opencode", "mcp", "add", "mlx", "--env", "A=b", "--", command, *started]
    assert code[:2] == ["code", "--add-mcp"]
    assert json.loads(code[2]) == {"name": "mlx", **entry}


def test_an_entry_that_a_command_made_is_replaced_and_removed_by_it(home):
    home.give("claude")
    home.run("install", "claude-code")
    home.run("install", "claude-code")
    assert len(home.called()) == 1
    home.run("install", "claude-code", "--model", "x")
    assert [call[2] for call in home.called()] == ["remove", "add-json"]
    home.run("uninstall", "claude-code")
    assert home.called() == [["claude", "mcp", "remove", "-s", "user", "mlx"]]
    assert home.json(".claude.json") == {"mcpServers": {}}


def test_an_http_server_that_a_command_has_registered_is_known_as_ours(home):
    home.give("claude")
    home.run("install", "claude-code", "--http", "http://127.0.0.1:8080/mcp")
    home.run("install", "claude-code", "--http", "http://127.0.0.1:9090/mcp")
    assert home.json(".claude.json")["mcpServers"]["mlx"]["url"] == "http://127.0.0.1:9090/mcp"
    home.run("uninstall", "claude-code")
    assert home.json(".claude.json") == {"mcpServers": {}}
    (home.folder / ".claude.json").write_text('{"mcpServers": {"mlx": {"type": "http", "url": "http://other/mcp"}}}')
    assert "--force" in home.run("uninstall", "claude-code", status=2)


def test_an_edit_of_the_file_is_taken_back_as_one_even_where_the_host_has_a_command(home):
    (home.folder / ".claude.json").write_text('{"a":1}')
    home.run("install", "claude-code")
    home.give("claude")
    home.run("uninstall", "claude-code")
    assert (home.folder / ".claude.json").read_text() == '{"a":1}'
    assert home.called() == []


def test_http_goes_by_the_hosts_command_too_unless_a_token_is_written_in_clear(home, monkeypatch):
    for program in ("codex", "gemini"):
        home.give(program)
    url = ["--http", "http://127.0.0.1:8080/mcp", "--token-env", "TOK"]
    home.run("install", "codex", "gemini", *url)
    codex, gemini = home.called()
    assert codex[2:] == ["add", "mlx", "--url", "http://127.0.0.1:8080/mcp", "--bearer-token-env-var", "TOK"]
    assert gemini[2:] == [
        *["add", "-s", "user", "-t", "http", "-H", "Authorization: Bearer ${TOK}", "mlx", "http://127.0.0.1:8080/mcp"]
    ]
    monkeypatch.setenv("TOK", "s3cret")
    home.run("install", "codex", *url, "--token-in-clear")
    assert home.called() == []
    assert "Bearer s3cret" in (home.folder / ".codex" / "config.toml").read_text()


def test_a_command_that_fails_is_told_with_what_it_said_and_the_way_without_it(home, monkeypatch):
    home.give("claude")
    monkeypatch.setenv("FAKE_ERROR", "no licence")
    said = home.run("install", "claude-code", status=2)
    assert "no licence" in said
    assert "failed with 1: " in said
    assert "Correct that and try again. Give --edit-file, which has" in said
    assert "is registered, in" in home.run("install", "claude-code", "--edit-file", "--force", "--name", "other")


def test_a_command_that_does_not_start_or_end_is_told_with_the_way_without_it(home, monkeypatch):
    home.give("claude")
    monkeypatch.setattr(host_command, "LIMIT_S", 0.2)
    (home.bin / "claude").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    said = home.run("install", "claude-code", status=2)
    assert "`claude` did not end within 0.2 s. Give --edit-file, which has" in said
    (home.bin / "claude").write_text("")
    said = home.run("install", "claude-code", status=2)
    assert "`claude` cannot be started (Exec format error). Give --edit-file, which has" in said


def test_the_folder_that_a_host_is_told_to_use_is_used(home, monkeypatch, tmp_path):
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "claude"))
    monkeypatch.setenv("CODEX_HOME", str(tmp_path / "codex"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    home.run("install", "claude-code", "codex", "goose")
    made = ("claude/.claude.json", "codex/config.toml", "xdg/goose/config.yaml")
    assert all((tmp_path / name).is_file() for name in made)
    assert home.files() == []


def test_an_environment_of_uvx_is_registered_as_uvx():
    for prefix in ("/home/me/.cache/uv/archive-v0/AbC", "/home/me/.cache/uv/environments-v2/x"):
        assert command_here(prefix, f"{prefix}/bin/python", "/bin/uvx") == ("/bin/uvx", ("mlx-mcp", "serve"))


def test_without_a_script_the_environments_python_is_registered(tmp_path):
    python = str(tmp_path / "bin" / "python")
    assert command_here(str(tmp_path), python) == (python, ("-m", "mlx_mcp", "serve"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mlx-mcp").touch(0o755)
    assert command_here(str(tmp_path), python) == (str(tmp_path / "bin" / "mlx-mcp"), ("serve",))
