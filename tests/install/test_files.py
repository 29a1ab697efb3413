"""Files that are refused, links, kills; entries of others; what lies in the record."""

import os
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

from mlx_mcp.errors import InstallError
from mlx_mcp.install.hosts import HOSTS
from mlx_mcp.install.server import Server
from tests.install.test_odd_files import SERVER, Place

OTHER = b'{"mcpServers": {"mlx": {"command": "npx", "args": ["other"]}}}'
BROKEN = {
    "no end": ("cursor", b'{\n  "mcpServers": {\n', "line 3, column 1"),
    "no comma": ("cursor", b'{\n  "a": 1\n  "b": 2\n}', "line 3, column 3: a comma or } is expected"),
    "no value": ("cursor", b'{"a": }', "line 1, column 7: a value is expected"),
    "no colon": ("cursor", b'{"a" 1}', "line 1, column 6: a colon is expected after the key"),
    "a key without quotes": ("cursor", b"{a: 1}", "line 1, column 2: a key in double quotes, or }, is expected"),
    "two objects": ("cursor", b"{}\n{}", "line 2, column 1: nothing may come after the end of the object"),
    "a text without an end": ("cursor", b'{\r\n"a": "b\r\n}', "line 2, column 8"),
    "a comment without an end": ("zed", b"{} /* x", "line 1, column 4: this comment does not end"),
    "nested without end": ("cursor", b"[" * 100_000, "line 1, column 1: this is nested too deeply"),
    "toml": ("codex", b'a = 1\nb = "\n', "line 2, column 6"),
    "toml twice": ("codex", b"[a]\n[b]\n[a]\n", "line 3, column 3"),
    "toml without an end": ("codex", b"a = [\n1,\n", "line 3, column 1"),
    "yaml": ("goose", b"a: 1\nb: [1,\n", "line 3, column 1"),
    "yaml, two documents": ("goose", b"a: 1\n---\nb: 1\n", "line 2, column 1"),
    "yaml, a tag that is not known": ("goose", b"a: !secret x\n", "line 1, column 4"),
    "yaml, tabs": ("goose", b"a:\n\tb: 1\n", "line 2, column 1"),
    "not UTF-8": ("cursor", b'{\n  "a": "\xe9"\n}', "is not UTF-8 (line 2, column 9). Save it as UTF-8"),
    "UTF-16": ("cursor", "{}".encode("utf-16"), "(line 1, column 1). Save it as UTF-8"),
}
UNFIT = {
    "the whole is a list": ("cursor", b"[]", "line 1, column 1: the whole is no object, as it should be"),
    "servers are a list": (
        "cursor",
        b'{\n  "mcpServers": []\n}',
        "line 2, column 17: 'mcpServers' is no object, as it should be",
    ),
    "servers are there twice": (
        "cursor",
        b'{"mcpServers": {},\n "mcpServers": {}}',
        "line 2, column 2: there is a second 'mcpServers'; remove one of them",
    ),
    "toml in braces": (
        "codex",
        b"mcp_servers = {a = {command = 'b'}}\n",
        "mcp_servers.mlx is not written as a table with a header of its own",
    ),
    "toml, no table": ("codex", b"mcp_servers = 1\n", "what should hold 'mlx' is '1'"),
    "yaml, an alias": (
        "goose",
        b"a: &x {b: 1}\nextensions: *x\n",
        "extensions.mlx is not written so that it can be edited",
    ),
    "yaml, a list": ("goose", b"extensions: [a]\n", "'mlx'"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    return lambda name, data: Place(tmp_path, monkeypatch, name, data)


@pytest.mark.parametrize("case", [*BROKEN, *UNFIT])
def test_a_file_that_is_broken_or_cannot_be_edited_is_refused_untouched_and_the_error_says_where(place, case):
    name, data, where = (BROKEN | UNFIT)[case]
    there = place(name, data)
    names = there.names()
    for work in (there.install, there.uninstall) if case in BROKEN else (there.install,):
        with pytest.raises(InstallError, match="edit it by hand: `mlx-mcp install --print` shows the entry") as caught:
            work()
        assert where in str(caught.value)
        assert case not in UNFIT or "Nothing was changed; edit it by hand" in str(caught.value)
        assert str(there.file) in str(caught.value)
    assert (there.data(), there.names(), there.record.edits()) == (data, names, [])


def test_a_read_only_file_is_refused_with_what_to_do(place):
    there = place("cursor", b"{}")
    there.file.chmod(0o444)
    with pytest.raises(InstallError, match=r"read-only.*chmod u\+w"):
        there.install()
    assert (there.data(), there.record.edits()) == (b"{}", [])
    there.file.chmod(0o640)
    there.install()
    assert there.file.stat().st_mode & 0o777 == 0o640


def test_a_new_file_is_the_users_alone(place):
    there = place("cursor", None)
    there.install()
    assert there.file.stat().st_mode & 0o777 == 0o600


def test_a_folder_in_the_files_place_is_refused(place):
    there = place("cursor", None)
    there.file.mkdir(parents=True)
    with pytest.raises(
        InstallError, match=r"cannot be read or written \(Is a directory\)\. Correct that, or edit it by hand"
    ):
        there.install()


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("data", [b'{"a": 1}', None], ids=["a file", "nothing yet"])
def test_a_symbolic_link_stays_one_and_what_it_leads_to_is_changed(place, tmp_path, data, absolute):
    there, kept = place("cursor", None), tmp_path / "home" / "dotfiles" / "mcp.json"
    kept.parent.mkdir()
    if data is not None:
        kept.write_bytes(data)
    there.file.parent.mkdir()
    there.file.symlink_to(kept if absolute else os.path.relpath(kept, there.file.parent))
    there.install()
    assert there.file.is_symlink()
    assert b"mlx-mcp" in kept.read_bytes()
    there.uninstall()
    assert there.file.is_symlink()
    assert (kept.read_bytes() if kept.exists() else None) == data


def test_an_entry_of_another_program_is_refused_and_by_force_replaced_and_put_back(place):
    there = place("cursor", OTHER)
    with pytest.raises(
        InstallError, match=r"does not start mlx-mcp\. Say with --name|Choose a --name, or replace it with --force"
    ):
        there.install()
    with pytest.raises(
        InstallError, match=r"does not start mlx-mcp\. Say with --name|Choose a --name, or replace it with --force"
    ):
        there.uninstall()
    assert there.data() == OTHER
    there.install(force=True)
    assert b"mlx-mcp" in there.data()
    there.install(Server("/new/mlx-mcp", ("serve",)))
    there.uninstall()
    assert there.data() == OTHER
    there.uninstall(force=True)
    assert there.data() == b'{"mcpServers": {}}'


@pytest.mark.parametrize(
    "entry",
    [
        b'{"command": "mlx-mcp", "args": ["serve"]}',
        b'{"command": "/usr/bin/python3", "args": ["-m", "mlx_mcp", "serve", "--model", "x"]}',
        b'{"command": "uvx", "args": ["mlx-mcp@1.0", "serve"]}',
        b'{"command": ["uvx", "--from", "mlx-mcp[cuda13]", "mlx-mcp", "serve"]}',
    ],
)
def test_an_entry_that_starts_this_server_is_ours_whoever_wrote_it(place, entry):
    there = place("cursor", b'{"mcpServers": {"mlx": %s}}' % entry)
    there.install()
    assert b"/opt/mlx/bin" in there.data()
    there.uninstall()
    assert there.data() == b'{"mcpServers": {}}'


def test_an_entry_that_a_user_has_changed_since_goes_too(place):
    there = place("zed", b'{\n  "context_servers": {\n    "a": {}, // b\n  },\n}\n')
    before = there.data()
    there.install()
    there.file.write_bytes(there.data().replace(b'"MLX_MCP_KV_BITS": "8"', b'"MLX_MCP_KV_BITS": "4"'))
    there.uninstall()
    assert there.data() == before


def test_a_file_that_a_host_has_written_anew_loses_the_entry_alone(place):
    there = place("claude-desktop", None)
    there.install()
    there.file.write_bytes(there.data().replace(b"\n", b"").replace(b"{", b'{"theme": "dark",', 1))
    there.uninstall()
    assert there.says(there.data()) == {"theme": "dark", "mcpServers": {}}


def test_folders_that_several_files_needed_go_with_the_last_of_them(place):
    all_of = [place(name, None) for name in ("goose", "zed", "vscode", "opencode", "claude-desktop")]
    before = all_of[0].names()
    for each in all_of:
        each.install()
    for each in all_of:
        each.uninstall()
    assert all_of[0].names() == before


def test_the_record_has_nothing_of_what_else_a_file_says(place):
    there = place("cursor", b'{\n  "mcpServers": {\n    "a": {"env": {"KEY": "secret"}}\n  }\n}\n')
    there.install()
    assert b"secret" not in there.record.file.read_bytes()
    assert there.record.file.stat().st_mode & 0o777 == 0o600
    assert there.record.file.parent.stat().st_mode & 0o777 == 0o700  # or no engine starts in it


def test_a_damaged_record_is_said_to_be_one(place):
    there = place("cursor", b"{}")
    there.install()
    there.record.file.write_text("{}")
    with pytest.raises(InstallError, match=r"is damaged\. Remove it: entries are then taken out"):
        there.uninstall()


def test_a_file_is_on_disk_before_it_takes_the_place_of_the_old_one_and_the_record_before_both(place, monkeypatch):
    there, done = place("cursor", b"{}"), []
    calls = {"fsync": os.fsync, "replace": os.replace}
    for name in calls:

        def noted(*arguments, name=name, call=calls[name]):
            done.append(name if name == "fsync" else Path(arguments[1]).name)
            return call(*arguments)

        monkeypatch.setattr(os, name, noted)
    there.install()
    assert done == ["fsync", "registrations.json", "fsync", "fsync", "mcp.json", "fsync"]


def test_a_file_that_changes_while_it_is_edited_is_left_as_it_is_then(place):
    there = place("cursor", b"{}")
    registration = there.registration()
    change = registration.install(there.host.entry("mlx", SERVER))
    there.file.write_bytes(b'{"a": 1}')
    with pytest.raises(InstallError, match=r"has changed meanwhile\. Run the command again"):
        registration.apply(change)
    assert (there.data(), there.record.edits()) == (b'{"a": 1}', [])
    there.install()
    there.uninstall()
    assert there.data() == b'{"a": 1}'


@pytest.mark.long
def test_several_installs_at_once_each_leave_their_entry_or_say_to_run_again(place, tmp_path):
    there, names = place("cursor", b'{"a": 1}'), [f"mlx{at}" for at in range(6)]
    command = [sys.executable, "-m", "mlx_mcp", "install", "cursor", "--name"]
    env = {**os.environ, "MLX_MCP_STATE_DIR": str(tmp_path / "state")}
    running = [subprocess.Popen([*command, name], env=env, stdout=DEVNULL, stderr=PIPE, text=True) for name in names]
    said = [process.communicate(timeout=100)[1] for process in running]
    for name, process, words in zip(names, running, said, strict=True):
        assert process.returncode == 0 or "Run the command again" in words
        assert (name in there.says(there.data())["mcpServers"]) == (process.returncode == 0)
    for name in reversed(list(there.says(there.data())["mcpServers"])):
        there.uninstall(name)
    assert there.data() == b'{"a": 1}'


@pytest.mark.parametrize("data", [b'{\n  "a": 1 // one\n}\n', None], ids=["a file", "nothing yet"])
@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_a_kill_leaves_the_old_or_the_new_file_and_both_can_go_on_from_there(place, tmp_path, action, data):
    place("cursor", data)
    command = [sys.executable, "-m", "tests.install.kills", "cursor", action, str(tmp_path / "state")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


def test_every_host_has_an_entry_that_starts_the_server_and_is_known_as_ours():
    from mlx_mcp.install.server import is_own

    for host in HOSTS:
        assert is_own(host.entry("mlx", SERVER)), host.name
        assert host.file(None).is_absolute(), host.name
        assert host.file(None).is_relative_to(Path.home()), host.name
