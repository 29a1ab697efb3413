"""`install` and `uninstall` on files as they are found: nothing but our entry changes, and it goes without a trace."""

from pathlib import Path

import pytest

from mlx_mcp.install.hosts import hosts_named
from mlx_mcp.install.record import Record
from mlx_mcp.install.registration import Registration
from mlx_mcp.install.server import Server
from mlx_mcp.install.texts import rest_of, same, value_at
from tests.install.odd_files import BOM, ODD_FILES

SERVER = Server("/opt/mlx/bin/mlx-mcp", ("serve", "--model", '~/Qwen "4B"\\é'), {"MLX_MCP_KV_BITS": "8"})


class Place:
    """A host's file below a folder, and what is kept of edits."""

    def __init__(self, folder, monkeypatch, name, data):
        monkeypatch.setenv("HOME", str(folder / "home"))
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
        (folder / "home").mkdir(exist_ok=True)
        (self.host,) = hosts_named([name])
        self.record = Record(folder / "state")
        self.file = self.host.file(None)
        if data is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_bytes(data)

    def registration(self, name="mlx"):
        return Registration(self.host, name, self.record)

    def install(self, server=SERVER, name="mlx", force=False):
        registration = self.registration(name)
        registration.apply(registration.install(self.host.entry(name, server), force))

    def uninstall(self, name="mlx", force=False):
        registration = self.registration(name)
        registration.apply(registration.uninstall(force))

    def data(self):
        return self.file.read_bytes() if self.file.exists() else None

    def says(self, data):
        return self.host.language(self.file).load((data or b"").removeprefix(BOM).decode())

    def names(self):
        return sorted(str(path.relative_to(Path.home())) for path in Path.home().rglob("*"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    return lambda name, data: Place(tmp_path, monkeypatch, name, data)


@pytest.fixture(params=ODD_FILES, ids=lambda title: title.replace(" ", "_"))
def odd(request, place):
    return place(*ODD_FILES[request.param])


def test_there_are_more_than_forty_odd_files_of_every_language():
    assert len(ODD_FILES) > 40
    assert {hosts_named([host])[0].file(None).suffix for host, _ in ODD_FILES.values()} >= {".json", ".toml", ".yaml"}


def test_uninstall_leaves_a_file_byte_for_byte_as_it_was_before_install(odd):
    before, names = odd.data(), odd.names()
    odd.install()
    odd.uninstall()
    assert odd.data() == before
    assert odd.names() == names
    assert odd.record.edits() == []


def test_install_adds_the_entry_and_changes_nothing_else_that_the_file_says(odd):
    before = odd.data()
    odd.install()
    path, after = odd.host.path("mlx"), odd.says(odd.data())
    assert same(value_at(after, path), odd.host.entry("mlx", SERVER))
    assert same(rest_of(after, path), rest_of(odd.says(before), path))
    (edit,) = odd.record.edits()
    # What is taken out comes again, or stood for nothing.
    assert edit.removed.strip(" \t\r\n{}~,") in edit.inserted


def test_two_installs_are_as_one(odd):
    odd.install()
    after, edits = odd.data(), odd.record.edits()
    odd.install()
    assert (odd.data(), odd.record.edits()) == (after, edits)


def test_an_install_with_other_settings_replaces_the_entry_and_is_taken_back_as_a_whole(odd):
    before, names = odd.data(), odd.names()
    odd.install(Server("/old/bin/mlx-mcp", ("serve",)))
    odd.install()
    assert same(value_at(odd.says(odd.data()), odd.host.path("mlx")), odd.host.entry("mlx", SERVER))
    odd.uninstall()
    assert (odd.data(), odd.names()) == (before, names)


def test_without_the_record_the_entry_goes_and_all_else_stays(odd):
    before = odd.says(odd.data())
    odd.install()
    odd.record.keep([])
    odd.uninstall()
    path = odd.host.path("mlx")
    assert value_at(odd.says(odd.data()), path) is None
    assert same(rest_of(odd.says(odd.data()), path), rest_of(before, path))


def test_two_servers_of_different_names_come_and_go_in_any_order(odd):
    before = odd.says(odd.data())
    odd.install(name="mlx")
    odd.install(name="mlx two")
    odd.uninstall(name="mlx")
    path = odd.host.path("mlx two")
    assert same(value_at(odd.says(odd.data()), path), odd.host.entry("mlx two", SERVER))
    odd.uninstall(name="mlx two")
    assert same(rest_of(odd.says(odd.data()), path), rest_of(before, path))


def test_what_others_add_meanwhile_stays(odd):
    odd.install()
    language, other = odd.host.language(odd.file), odd.host.entry("other", Server("/bin/other", ()))
    text = language.with_entry(odd.data().removeprefix(BOM).decode(), odd.host.path("other"), other)
    odd.file.write_text(text, newline="")
    odd.uninstall()
    assert value_at(odd.says(odd.data()), odd.host.path("mlx")) is None
    assert same(value_at(odd.says(odd.data()), odd.host.path("other")), other)
