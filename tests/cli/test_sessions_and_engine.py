"""`mlx-mcp sessions` beside real engine processes."""

import contextlib
import json
import os
import subprocess
import threading

import pytest
from typer.testing import CliRunner

from mlx_mcp.cli import folder_owner
from mlx_mcp.cli.main import app
from mlx_mcp.process.locks import try_lock
from mlx_mcp.storage.store import Store
from tests.cli.test_sessions import keep
from tests.process.windows import WAIT_S, Window, command, run, state_folder, status

FACT = "Alice's badge is 771."


def settings(folder):
    return {"MLX_MCP_STORE_DIR": str(folder), "MLX_MCP_MAX_SSD_BYTES": str(1 << 30)}


def started(env, *arguments):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command(*arguments), env=env, text=True, **pipes)


@pytest.mark.long
def test_a_prompt_cache_goes_out_and_comes_in_through_a_running_engine(tmp_path):
    with state_folder(**settings(tmp_path / "store")) as (_, env), Window(env) as window:

        def sessions(*arguments):
            done = run(env, "sessions", *arguments, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            return done.stdout

        window.ask("create_session", system=FACT, name="facts")
        window.ask("persist_session", session="facts")
        assert "MB" in sessions("export", "facts", "facts.safetensors", "--as", "prompt-cache")
        assert sessions("import", "facts.safetensors", "--name", "again").endswith(" again\n")
        assert window.generate("What is Alice's badge?", session="again")["text"] == "771"
        assert not list(tmp_path.glob(".mlx-mcp-*")), "what was written on the way is gone"


@pytest.mark.long
def test_every_command_works_while_an_engine_runs_and_the_same_without(tmp_path):
    with state_folder(**settings(tmp_path / "store")) as (place, env), Window(env) as window:

        def sessions(*arguments, expect=0):
            done = run(env, "sessions", *arguments, cwd=tmp_path)
            assert done.returncode == expect, done.stderr
            return done.stdout if expect == 0 else done.stderr

        session = window.ask("create_session", system=FACT, name="facts")["session"]
        assert "in memory only" in sessions("export", "facts", "facts.kv", expect=2)
        window.ask("persist_session", session="facts", version="v1")
        assert {head["version"] for head in json.loads(sessions("list", "--json"))} == {"", "v1"}
        assert session in sessions("list")
        assert FACT in sessions("show", "facts")
        # Where the user is, not where the engine is:
        assert sessions("export", "facts", "facts.kv").startswith("facts.kv: ")
        assert (tmp_path / "facts.kv").stat().st_size > 1000
        assert sessions("rm", "facts", "--version", "v1") == "removed 1\n"
        assert sessions("rm", "facts") == "removed 1\n"
        assert window.ask("list_sessions")["sessions"] == []
        assert f"There is no file {tmp_path}/nofile" in sessions("import", "nofile", expect=2)
        assert sessions("import", "facts.kv") == f"{session} facts\n"
        answer = window.generate("What is Alice's badge?", session="facts")
        assert answer["text"] == "771"
        assert answer["restored_tokens"] > 0
        assert "gone on since" in sessions("import", "facts.kv", expect=2)
        assert sessions("purge", "--yes") == "purged\n"
        assert json.loads(sessions("list", "--json")) == []
        assert window.ask("list_sessions")["sessions"] == []
        assert status(place)["connections"], "the engine and its window live on"
        assert run(env, "engine", "stop").returncode == 0
        assert sessions("import", "facts.kv") == f"{session} facts\n"
        assert FACT in sessions("show", "facts")
        assert sessions("rm", "facts") == "removed 1\n"
        assert "not found" in sessions("show", "facts", expect=2)
        assert window.ask("list_sessions")["sessions"] == [], "the window has another engine started"


@pytest.mark.long
def test_an_engine_that_is_just_ending_is_waited_for(tmp_path):
    """It holds the folder until it has written everything, and cannot be asked any more."""
    keep(tmp_path / "store")
    with state_folder(**settings(tmp_path / "store")) as (place, env):
        place.prepare()
        store = Store.open(tmp_path / "store", quota_bytes=1 << 30, daily_bytes=1 << 30)
        with contextlib.ExitStack() as ending:
            assert ending.enter_context(try_lock(place.life_lock))
            with started(env, "sessions", "rm", "facts") as asked:
                with pytest.raises(subprocess.TimeoutExpired):
                    asked.wait(3)
                store.close()
                ending.close()
                assert asked.communicate(timeout=WAIT_S) == ("removed 1\n", "")


def test_no_engine_starts_on_the_folder_while_a_command_changes_it(tmp_path):
    """It would find the folder locked, and keep nothing on disk for as long as it lives."""
    keep(tmp_path / "store")
    with state_folder(**settings(tmp_path / "store")) as (_, env):
        with started(env, "sessions", "purge") as asked:
            windows = [Window(env, handshake=False) for _ in range(2)]
            out, _ = asked.communicate("y\n", timeout=WAIT_S)
            assert out.endswith("purged\n")
        for window in windows:
            with window:
                window.handshake()
                session = window.ask("create_session", system=FACT)["session"]
                window.ask("persist_session", session=session)


@pytest.mark.long
def test_an_engine_that_has_another_folder_open_is_none_of_the_commands_business(tmp_path):
    keep(tmp_path / "other")
    with state_folder(**settings(tmp_path / "store")) as (_, env):
        assert run(env, "engine", "start").returncode == 0
        done = run(env | settings(tmp_path / "other"), "sessions", "rm", "facts")
        assert (done.stdout, done.returncode) == ("removed 1\n", 0), done.stderr


@contextlib.contextmanager
def answering(place, *lines):
    """Something at the engine's place that answers the first hello with these lines and hangs up."""
    place.prepare()
    listener = place.listen()
    listener.setblocking(True)

    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    thread = threading.Thread(target=answer)
    thread.start()
    yield
    thread.join(WAIT_S)
    listener.close()
    os.unlink(place.socket)


def test_an_engine_that_ends_meanwhile_is_told(tmp_path):
    keep(tmp_path / "store")
    with state_folder(**settings(tmp_path / "store")) as (place, env):
        with answering(place, {"pid": 1}, {"done": 1, "total": 2}):
            done = run(env, "sessions", "export", "facts", str(tmp_path / "x"))
        assert done.returncode == 2
        assert "The engine ended before that was done" in done.stderr
        assert not (tmp_path / "x").exists()


def test_an_engine_that_falls_silent_meanwhile_is_told_with_how_to_end_it(tmp_path, monkeypatch):
    keep(tmp_path / "store")
    monkeypatch.setattr(folder_owner, "SILENT_S", 0.2)
    with state_folder(**settings(tmp_path / "store")) as (place, env):
        for name in ("MLX_MCP_STATE_DIR", *settings(tmp_path / "store")):
            monkeypatch.setenv(name, env[name])
        listener = place.listen()
        listener.setblocking(True)
        ended = threading.Event()

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b'{"pid": 1}\n')
                assert ended.wait(WAIT_S)

        thread = threading.Thread(target=answer)
        thread.start()
        done = CliRunner().invoke(app, ["sessions", "rm", "facts"])
        ended.set()
        thread.join(WAIT_S)
        listener.close()
        os.unlink(place.socket)
    assert done.exit_code == 2
    assert "The engine has said nothing for 0.2 s. `mlx-mcp engine stop` ends it" in done.output


def test_looking_is_possible_beside_an_engine_that_is_too_old_for_the_question(tmp_path):
    keep(tmp_path / "store")
    old = {"error": "The engine (0.1.0) knows no 'sessions'; `mlx-mcp engine stop` ends it."}
    with state_folder(**settings(tmp_path / "store")) as (place, env):
        with answering(place, old):
            assert "facts" in run(env, "sessions", "list").stdout
        with answering(place, old):
            done = run(env, "sessions", "rm", "facts")
        assert (done.returncode, done.stdout) == (2, "")
        assert "`mlx-mcp engine stop`" in done.stderr
