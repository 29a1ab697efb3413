"""`mlx-mcp sessions`, over a folder that a store has filled."""

import json

import pytest
from typer.testing import CliRunner

from mlx_mcp.cli.main import app
from mlx_mcp.core.durable import SessionRecord
from mlx_mcp.core.origin import Origin
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.storage.store import Store
from tests.storage.world import raw


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MCP_STORE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("MLX_MCP_MAX_SSD_BYTES", str(1 << 30))
    return tmp_path / "store"


def opened(folder):
    return Store.open(folder, quota_bytes=1 << 30, daily_bytes=1 << 30)


def keep(
    folder,
    name="facts",
    version="",
    text="Alice's badge is 771.",
    session_id="",
    model="embedded",
    parts=None,
    origins=(),
):
    block = StoredBlock(
        name.encode(), b"root", 0, (1, 2, 3), 0, True, raw(6 + len(name)), (memoryview(b"CANARY" + name.encode()),)
    )
    record = SessionRecord(
        session_id=session_id or f"s_{name}",
        tenant="",
        model=model,
        name=name,
        version=version,
        fingerprint=b"f",
        tokenizer=b"t",
        text=json.dumps(parts or [["<|user|>"], text]),
        tokens=(1, 2, 3),
        num_kept=3,
        after="user",
        tools=(),
        parent_id="",
        ttl_s=1e6,
        pinned=False,
        ephemeral=False,
        saved_at=1.0,
        used_at=1.0,
        blocks=(block.key,),
        origins=origins,
    )
    store = opened(folder)
    store.persist([block], record)
    store.close()


def run(*arguments):
    return CliRunner().invoke(app, ["sessions", *arguments])


def test_list_shows_every_session_and_version(folder):
    keep(folder)
    keep(folder, version="v1")
    shown = run("list").output
    assert shown.count("facts") >= 2
    assert "v1" in shown


def test_show_tells_what_was_said(folder):
    keep(folder)
    assert run("show", "facts").output.strip() == "<|user|>Alice's badge is 771."
    assert run("show", "s_facts").exit_code == 0


def test_show_tells_before_each_turn_when_it_was_asked_for_and_by_which_client(folder):
    parts = [["", 0], ["<|user|>"], "Hi", ["", 1], " there!", ["", 2], "Bye!"]
    origins = (Origin("claude-code 2.1.332", 1764541234.0, 0), Origin("", 1764541235.0, 2))
    keep(folder, parts=parts, origins=origins)
    assert run("show", "facts").output == (
        "[2025-11-30 22:20:34 UTC, claude-code 2.1.332]\n<|user|>Hi there!\n[2025-11-30 22:20:35 UTC]\nBye!\n"
    )
    shown = json.loads(run("show", "facts", "--json").output)
    assert shown["text"] == "<|user|>Hi there!Bye!"
    assert shown["turns"] == [
        {"who": "claude-code 2.1.332", "at": 1764541234.0, "begin": 0},
        {"who": "", "at": 1764541235.0, "begin": 17},
    ]


def test_rm_removes_a_version_or_all_of_a_session_with_its_bytes(folder):
    keep(folder)
    keep(folder, version="v1")
    assert run("rm", "facts", "--version", "v1").output == "removed 1\n"
    assert "v1" not in run("list").output
    assert run("rm", "facts").output == "removed 1\n"
    assert not any(b"CANARY" in path.read_bytes() for path in folder.iterdir())


def test_purge_asks_first_and_leaves_nothing(folder):
    keep(folder)
    assert CliRunner().invoke(app, ["sessions", "purge"], input="n\n").exit_code == 1
    assert "facts" in run("list").output
    assert run("purge", "--yes").exit_code == 0
    assert not any(b"CANARY" in path.read_bytes() for path in folder.iterdir())


def test_an_export_is_imported_where_another_store_is(folder, tmp_path, monkeypatch):
    keep(folder)
    assert run("export", "facts", str(tmp_path / "facts.kv")).exit_code == 0
    monkeypatch.setenv("MLX_MCP_STORE_DIR", str(tmp_path / "other"))
    assert run("import", str(tmp_path / "facts.kv")).output == "s_facts facts\n"
    assert run("show", "facts").output.strip() == "<|user|>Alice's badge is 771."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "nobody"), "Session not found"),
        (("rm", "nobody"), "Session not found"),
        (("export", "nobody", "x"), "Session not found"),
        (("import", "/nowhere/x"), "There is no file /nowhere/x. Give one that `mlx-mcp sessions export` wrote"),
        (("import", "/"), "is a folder: give a file that `mlx-mcp sessions export` wrote"),
        (("import", "/etc/passwd/x"), "cannot be read: Not a directory. Give another file"),
        (("export", "facts", "/"), "is a folder: give the file that is to be written"),
        (("export", "facts", "/nowhere/x"), "There is no folder /nowhere. Make it first, or choose another"),
        (("export", "facts", "/etc/passwd/x"), "cannot be written to: Not a directory. Choose another folder"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(folder, arguments, said):
    keep(folder)
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_session_that_is_damaged_is_said_to_be_and_what_to_do(folder):
    keep(folder)
    [file] = folder.glob("*.session.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    result = run("show", "facts")
    assert result.exit_code == 2
    assert "What was kept of session 'facts' is damaged. Remove it: `mlx-mcp sessions rm facts`" in result.output


def test_a_folder_that_a_server_has_open_is_left_alone(folder):
    keep(folder)
    store = opened(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for arguments in (("rm", "facts"), ("purge", "--yes"), ("export", "facts", str(folder.parent / "x"))):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "mlx-mcp engine stop" in result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    store.close()


def test_looking_is_possible_while_a_server_has_the_folder_open_and_changes_nothing(folder):
    keep(folder)
    (folder / ("0" * 40 + ".session.safetensors")).write_bytes(b"damaged")
    store = opened(folder)
    (folder / ("1" * 40 + ".session.safetensors")).write_bytes(b"damaged since")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "facts" in run("list").output
    assert run("show", "facts").output.strip() == "<|user|>Alice's badge is 771."
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    store.close()


def test_sessions_in_the_earlier_form_are_spoken_of_and_stay(folder):
    keep(folder)
    old = folder / ("0" * 40 + ".session")
    old.write_bytes(b"mlxmcpS1")
    for arguments in (("list",), ("show", "facts"), ("show", "older")):
        said = " ".join(run(*arguments).output.split())
        assert "1 durable sessions" in said
        assert "begin new sessions" in said
    assert old.exists()


def test_where_nothing_was_kept_the_list_is_empty_and_no_folder_is_made(folder):
    assert run("list").exit_code == 0
    assert json.loads(run("list", "--json").stdout) == []
    result = run("show", "facts")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert not folder.exists()
