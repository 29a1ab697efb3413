"""What a user sees in a terminal of 72 columns."""

import json
import re

import pytest

from mlx_mcp.cli.output import Column, cut, table
from tests.cli.terminal import Terminal, shown
from tests.cli.test_main import mlx_mcp_command
from tests.cli.test_sessions import keep
from tests.process.windows import Window, run, state_folder

HANDLE = "s_" + "0123456789abcdef" * 2


@pytest.fixture
def sessions(tmp_path):
    """Settings that lead to a folder with a session whose handle and name are as long as they get."""
    keep(tmp_path / "store", name="n" * 64, session_id=HANDLE, model="mlx-community/" + "Qwen" * 12)
    return {"MLX_MCP_STORE_DIR": str(tmp_path / "store"), "MLX_MCP_MAX_SSD_BYTES": str(1 << 30)}


def test_tables_wrap_nothing_and_leave_ids_whole(sessions, tmp_path):
    lines, status = shown("sessions", "list", **sessions)
    assert status == 0
    assert max(map(len, lines)) <= 72
    assert any(line.startswith(f"{HANDLE}  nnnn") and "…" in line for line in lines)
    long = tmp_path / ("a-model-of-a-long-name-" * 2)
    long.mkdir()
    lines, _ = shown("models", "--model", str(long))
    assert max(map(len, lines)) <= 72
    assert any(line.startswith(f"{long.name} (default)") for line in lines)


def test_where_no_terminal_is_nothing_is_cut(sessions):
    piped = mlx_mcp_command("sessions", "list", **sessions, COLUMNS="40").stdout
    assert HANDLE in piped
    assert "n" * 64 in piped
    assert "Qwen" * 12 in piped
    assert "mlx-community/Qwen3-4B-4bit`." in mlx_mcp_command("models", COLUMNS="40").stdout


@pytest.mark.long
def test_the_engine_and_its_sessions_fit_too():
    with state_folder() as (place, env), Window(env) as window:
        session = window.ask("create_session", system="Alice's badge is 771.")["session"]
        lines, status = shown("engine", "status", **env)
        assert status == 0
        assert max(map(len, lines)) <= 72, lines
        assert any(line.split() == [str(window.process.pid), session] for line in lines)
        state = json.loads(run(env, "engine", "status", "--json").stdout)
        assert state["connections"][0]["sessions"] == [session]
        assert place


def test_whole_columns_stay_and_others_go_by_their_rank():
    columns = (Column("id", whole=True), Column("name", rank=1), Column("about", rank=2))
    rows = [["x" * 10, "y" * 20, "z" * 50], ["x", "y", "z"]]
    assert table(columns, rows, None, "…")[1] == f"{'x' * 10}  {'y' * 20}  {'z' * 50}"
    assert table(columns, rows, 60, "…")[1] == f"{'x' * 10}  {'y' * 20}  {'z' * 25}…"
    assert table(columns, rows, 30, "…")[1] == f"{'x' * 10}  {'y' * 7}…  {'z' * 7}…"
    assert table(columns, rows, 28, "...")[1] == f"{'x' * 10}  {'y' * 13}..."
    assert table(columns, rows, 5, "…") == ["id", "x" * 10, "x"]
    assert table(columns, [["x", "", "z"]], 60, "…") == ["id  about", "x   z"]
    assert table(columns, [], 60, "…") == ["id  name  about"]


def test_wide_characters_take_two_cells_and_none_speaks_to_the_terminal():
    assert cut("日本語テキスト", 8, "…") == "日本語…"
    (_, line) = table((Column("a"), Column("b")), [["日本", "x"]], 20, "…")
    assert line == "日本  x"
    (_, line) = table((Column("a"),), [["\x1b[31mred\x07\nend"]], None, "…")
    assert line == "\\x1b[31mred\\x07 end"


@pytest.mark.parametrize("arguments", [[], pytest.param(["--standalone"], marks=pytest.mark.long)])
def test_serve_says_in_a_terminal_what_it_waits_for_and_ends_with_ctrl_d(arguments):
    with state_folder() as (_, env), Terminal("serve", *arguments, **env) as terminal:
        terminal.until("Ctrl-D ends this.")
        assert "waiting for an MCP host" in terminal.text
        assert "claude mcp add mlx -- mlx-mcp serve" in terminal.text
        assert max(map(len, terminal.lines)) <= 72
        terminal.type(b"\x04")
        assert terminal.end() == 0


def test_serve_says_nothing_to_a_host():
    with state_folder() as (_, env):
        window = Window(env)
        window.process.stdin.close()
        assert window.process.stderr.read() == b""
        window.close()


@pytest.mark.long
def test_ctrl_c_ends_a_run_with_130_wherever_it_is():
    for words in ("starting MLX", "1 2 3"):
        with Terminal("run", "Count from 1 to 99.", "--max-tokens", "1000") as terminal:
            terminal.until(words)
            terminal.type(b"\x03")
            assert terminal.end() == 130, terminal.text
            assert "Traceback" not in terminal.text
            assert "terminate" not in terminal.text


@pytest.mark.long
def test_a_load_is_shown_in_bytes_and_leaves_the_answer_alone():
    with Terminal("run", "Alice's badge is 771. What is Alice's badge?") as terminal:
        assert terminal.end() == 0
    assert re.search(r"\d\.\d of \d\.\d MB", terminal.text)
    assert [line for line in terminal.lines if line.strip()][-2:] == [
        "771",
        "embedded: 26 prompt tokens, 2 generated, ended by stop",
    ]


def test_colours_are_left_out_where_nobody_wants_them():
    for env, colored in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with Terminal("doctor", **env) as terminal:
            terminal.until("mcp 2.3")
        assert ("\x1b[32m" in terminal.text) == colored
