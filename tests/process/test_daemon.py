"""The engine process: who finds it, who starts it, and when it ends."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mlx_mcp
from mlx_mcp import __version__
from mlx_mcp.errors import ConfigError, EngineUnavailable
from mlx_mcp.process import daemon
from mlx_mcp.process.daemon import greet
from mlx_mcp.process.environment import window_hello
from mlx_mcp.process.locks import take_life_lock, try_lock
from tests.process.windows import (
    LONG,
    WAIT_S,
    Window,
    command,
    is_alive,
    refused,
    run,
    state_folder,
    status,
    wait_until,
)

FALLBACK = "serving in this process alone"


@pytest.fixture
def running():
    """An engine that nothing else uses."""
    with state_folder() as (place, env):
        assert run(env, "engine", "start").returncode == 0
        yield place, env


@pytest.fixture(scope="module")
def standing():
    """An engine for the tests that leave it as it is."""
    with state_folder() as (place, env):
        yield place, env


@pytest.fixture
def shared(standing):
    """The same, which runs."""
    place, env = standing
    assert run(env, "engine", "start").returncode == 0
    return place, env


def hello(**changes):
    """A window of the same settings as the engine, but for what is changed."""
    return window_hello("stdio", None) | {"again": False} | changes


def settings(env):
    """The engine's settings as a window with that environment sees them."""
    code = "import json; from mlx_mcp.process.environment import engine_settings; print(json.dumps(engine_settings()))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_start_status_logs_and_stop(running):
    place, env = running
    engine = status(place)["pid"]
    assert run(env, "engine", "start").stdout == f"The engine is process {engine}.\n"
    assert f"process {engine}" in run(env, "engine", "status").stdout
    assert place.log in run(env, "engine", "logs").stderr
    stopped = run(env, "engine", "stop")
    assert (stopped.returncode, stopped.stdout) == (0, f"Process {engine} has ended.\n")
    wait_until(lambda: not is_alive(engine))
    assert not os.path.exists(place.socket)
    assert run(env, "engine", "stop").stdout == "There is no engine process.\n"
    nothing = run(env, "engine", "status")
    assert (nothing.returncode, "no engine process" in nothing.stdout) == (1, True)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at descriptors through /proc")
def test_the_engine_is_detached_from_whoever_started_it(shared):
    place, env = shared
    engine = status(place)["pid"]
    assert os.getsid(engine) == engine
    targets = {os.readlink(f"/proc/{engine}/fd/{fd}") for fd in (0, 1, 2)}
    assert targets == {"/dev/null", place.log}
    assert stat.S_IMODE(os.stat(place.log).st_mode) == stat.S_IMODE(os.stat(place.socket).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(place.socket_folder).st_mode) == 0o700
    with Window(env) as stays:
        starter = Window(env)
        starter.kill()
        assert stays.serves()
        starter.close()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="looks at descriptors through /proc")
def test_no_descriptor_of_the_host_reaches_the_engine():
    with state_folder() as (place, env):
        read, write = os.pipe()
        os.set_inheritable(write, True)
        with Window(env, close_fds=False):
            engine = status(place)["pid"]
            os.close(write)
            # The relay still has it, as it would have a host's; the engine has not.
            held = [os.readlink(f"/proc/{engine}/fd/{fd}") for fd in os.listdir(f"/proc/{engine}/fd")]
            assert os.readlink(f"/proc/self/fd/{read}") not in held
        os.close(read)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the environment through /proc")
def test_the_engine_keeps_nothing_of_its_hosts_environment_but_what_it_needs(tmp_path):
    canary = "canary-a7f3"
    names = "ANTHROPIC_API_KEY OPENAI_API_KEY AWS_SECRET_ACCESS_KEY GITHUB_TOKEN SSH_AUTH_SOCK CLAUDE_CODE_SESSION_ID "
    names += "CLAUDE_CODE_SSE_PORT CLAUDE_PROJECT_DIR MLX_MCP_TOKEN SECRET"
    secrets = dict.fromkeys(names.split(), canary)
    needed = {"HF_HUB_OFFLINE": "1", "LC_TIME": "C", "https_proxy": "http://localhost:1", "OMP_NUM_THREADS": "1"}
    store = tmp_path / "store"
    with (
        state_folder(**secrets, **needed, MLX_MCP_STORE_DIR=str(store), MLX_MCP_MAX_SSD_BYTES=str(1 << 30)) as (
            place,
            env,
        ),
        Window(env) as window,
    ):
        window.generate(keep=True)
        session = window.ask("list_sessions")["sessions"][0]["session"]
        window.ask("persist_session", session=session)
        engine = status(place)["pid"]
        kept = Path(f"/proc/{engine}/environ").read_bytes()
        assert canary.encode() not in kept
        assert all(f"{name}={value}".encode() in kept.split(b"\0") for name, value in needed.items())
        written = [path for folder in (store, Path(place.folder)) for path in folder.rglob("*") if path.is_file()]
        assert len(written) > 3
        assert not [path for path in written if canary.encode() in path.read_bytes()]


@pytest.mark.long
def test_two_engines_never_live_in_one_folder(running):
    place, env = running
    with pytest.raises(EngineUnavailable, match="Another engine"):
        take_life_lock(place, 0.05)
    engine = status(place)["pid"]
    second = subprocess.Popen(command("engine", "run"), env=env, stderr=subprocess.PIPE)
    try:
        # It waits for the first to end, and serves then.
        assert status(place)["pid"] == engine
        assert daemon.stop(place, 30) == engine
        wait_until(lambda: daemon.ask(place, "status") is not None)
        assert status(place)["pid"] == second.pid
    finally:
        second.terminate()
        assert second.wait(WAIT_S) == 0
        second.stderr.close()


@pytest.mark.long
def test_an_engine_whose_starter_was_killed_is_joined_by_the_next():
    with state_folder() as (place, env):
        orphan = subprocess.Popen(command("engine", "run"), env=env, stderr=subprocess.DEVNULL)
        wait_until(lambda: os.path.exists(place.life_lock))
        with Window(env) as other:
            assert status(place)["pid"] == orphan.pid
            assert other.serves()
        assert daemon.stop(place, 30) == orphan.pid
        assert orphan.wait(WAIT_S) == 0
        assert daemon.ask(place, "status") is None


@pytest.mark.long
def test_an_idle_engine_ends_and_the_next_call_of_an_open_window_starts_another():
    with state_folder(MLX_MCP_ENGINE_IDLE_S="0.5") as (place, env), Window(env) as open_window:
        engine = status(place)["pid"]
        assert open_window.serves()
        wait_until(lambda: not is_alive(engine))
        assert "nothing was to do" in run(env, "engine", "logs").stdout
        assert open_window.serves()
        assert status(place)["pid"] != engine


@pytest.mark.long
def test_an_engine_is_not_idle_while_a_call_runs_or_an_open_window_has_sessions():
    with state_folder(MLX_MCP_ENGINE_IDLE_S="0.3") as (place, env):
        with Window(env) as open_window:
            engine = status(place)["pid"]
            long = open_window.answer(open_window.call("generate", **LONG | {"keep": True, "max_tokens": 120}))
            assert "structuredContent" in long["result"]
            with pytest.raises(AssertionError, match="in time"):
                wait_until(lambda: not is_alive(engine), timeout_s=0.8)
            open_window.ask("close_session", all=True)
            wait_until(lambda: not is_alive(engine))


@pytest.mark.long
def test_stop_lets_a_running_call_end_and_the_window_goes_on_afterwards(running):
    place, env = running
    with Window(env) as open_window:
        call = open_window.call("generate", **LONG | {"max_tokens": 200})
        wait_until(lambda: status(place)["rows"] == 1)
        engine = status(place)["pid"]
        assert run(env, "engine", "stop").returncode == 0
        assert "structuredContent" in open_window.answer(call)["result"]
        wait_until(lambda: not is_alive(engine))
        assert open_window.serves()
        assert status(place)["pid"] != engine


@pytest.mark.long
def test_a_signal_ends_the_engine_within_the_time_for_that():
    with state_folder(MLX_MCP_SHUTDOWN_TIMEOUT_S="0.2") as (place, env), Window(env) as open_window:
        call = open_window.call("generate", **LONG)
        wait_until(lambda: status(place)["rows"] == 1)
        engine = status(place)["pid"]
        os.kill(engine, signal.SIGTERM)
        assert "Call again" in open_window.answer(call)["result"]["content"][0]["text"]
        wait_until(lambda: not is_alive(engine))
        assert "Traceback" not in run(env, "engine", "logs").stdout


# Other versions, other settings


@pytest.mark.long
def test_an_idle_engine_of_another_version_makes_room_at_once_while_a_window_is_open(running):
    place, env = running
    with Window(env) as open_window:
        assert open_window.serves()
        engine = status(place)["pid"]
        joined = greet(place, hello(version="99.0"))
        joined.connection.close()
        assert f"version {__version__} makes room for 99.0" in joined.reply["leaving"]
        wait_until(lambda: not is_alive(engine))
        assert open_window.serves()
        assert status(place)["pid"] != engine


@pytest.mark.long
def test_a_busy_engine_of_another_version_makes_room_once_it_is_idle(running):
    place, env = running
    with Window(env) as open_window:
        call = open_window.call("generate", **LONG | {"keep": True, "max_tokens": 200})
        wait_until(lambda: status(place)["rows"] == 1)
        engine = status(place)["pid"]
        joined = greet(place, hello(version="99.0", settings=settings(env)))
        assert "makes room for 99.0 as soon as it is idle" in joined.reply["notes"][0]
        joined.connection.close()
        assert "makes room for 99.0" in run(env, "engine", "status").stdout
        assert "structuredContent" in open_window.answer(call)["result"]
        assert is_alive(engine)  # it has a session
        open_window.ask("close_session", all=True)
        wait_until(lambda: not is_alive(engine))
        assert open_window.serves()


def test_a_window_of_another_version_starts_its_own_engine(tmp_path):
    shutil.copytree(
        os.path.dirname(mlx_mcp.__file__), tmp_path / "mlx_mcp", ignore=shutil.ignore_patterns("__pycache__")
    )
    init = tmp_path / "mlx_mcp" / "__init__.py"
    init.write_text(init.read_text().replace(__version__, "99.0"))
    with state_folder() as (place, env), Window(env) as old:
        assert old.serves()
        with Window(env | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path) as new:
            assert new.serves()
            assert status(place)["version"] == "99.0"
            # The one that was open goes on with it, and does not want its own version back.
            assert old.serves()
            assert status(place)["version"] == "99.0"


def test_other_settings_join_an_engine_in_use_and_say_so(shared):
    place, env = shared
    with Window(env):
        engine = status(place)["pid"]
        with Window(env | {"MLX_MCP_MAX_RUNNING": "7"}) as other:
            assert other.serves()
            assert status(place)["pid"] == engine
            other.process.stdin.close()
            assert "MLX_MCP_MAX_RUNNING" in other.process.stderr.read().decode()


def test_other_settings_have_an_engine_that_nobody_uses_started_again(running):
    place, env = running
    engine = status(place)["pid"]
    with Window(env | {"MLX_MCP_MAX_RUNNING": "7"}) as other:
        assert other.serves()
        assert status(place)["pid"] != engine


def test_settings_of_a_window_are_no_reason(shared, tmp_path):
    place, env = shared
    engine = status(place)["pid"]
    mine = {"MLX_MCP_MODEL": "embedded", "MLX_MCP_FILE_ROOTS": str(tmp_path), "MLX_MCP_PORT": "0"}
    mine |= {"MLX_MCP_ALLOWED_HOSTS": "mine.example", "MLX_MCP_ALLOWED_ORIGINS": "https://page.example"}
    with Window(env | mine):
        assert status(place)["pid"] == engine


# Faults


def test_settings_that_cannot_work_end_the_window_with_one_clear_line():
    with state_folder() as (_, env):
        for changes, words in (
            ({"MLX_MCP_KV_BITS": "3"}, "kv_bits"),
            ({"MLX_MCP_ENGINE_IDLE_S": "0"}, "engine_idle_s"),
        ):
            done = refused(env | changes)
            assert (done.returncode, done.stdout) == (2, "")
            assert words in done.stderr
            assert "Traceback" not in done.stderr
        for arguments, words in (
            (["--model", "/nowhere"], "hub id"),
            (["--port", "1"], "--http"),
            (["--mod"], "--mod"),
        ):
            done = refused(env, *arguments)
            assert (done.returncode, done.stdout) == (2, "")
            assert words in done.stderr


@pytest.mark.parametrize("engine", [False, True], ids=["no engine", "an engine in use"])
def test_a_typo_in_a_windows_settings_ends_it_with_the_name_that_was_meant(engine, tmp_path):
    config = tmp_path / "config.toml"
    with state_folder(MLX_MCP_CONFIG=str(config)) as (_, env), contextlib.ExitStack() as windows:
        if engine:
            windows.enter_context(Window(env))
        typo = refused(env | {"MLX_MCP_MAX_KV_BYTE": "1"})
        config.write_text('modle = "x"\n')
        in_the_file = refused(env)
    for done in (typo, in_the_file):
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
    assert "MLX_MCP_MAX_KV_BYTE is no setting; did you mean MLX_MCP_MAX_KV_BYTES?" in typo.stderr
    assert f"{config}: modle is no setting; did you mean model?" in in_the_file.stderr


def test_file_roots_that_are_no_folders_are_named():
    with state_folder() as (_, env):
        done = refused(env | {"MLX_MCP_FILE_ROOTS": "/nowhere"})
        assert done.returncode == 2
        assert "file_roots" in done.stderr


def test_the_help_of_serve_is_the_command_lines():
    done = run(os.environ, "serve", "--help")
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in ("--standalone", "--http", "--model"))


def test_an_engine_that_does_not_answer_is_named(shared, monkeypatch):
    place, _ = shared
    engine = status(place)["pid"]
    monkeypatch.setattr(daemon, "ANSWER_S", 0.1)
    os.kill(engine, signal.SIGSTOP)
    try:
        with pytest.raises(
            EngineUnavailable, match=r"or it hangs\. `mlx-mcp engine stop --force` ends it; then try again"
        ):
            greet(place, hello())
    finally:
        os.kill(engine, signal.SIGCONT)


def test_an_engine_that_is_not_ready_in_time_is_ended(monkeypatch):
    with state_folder() as (place, _):
        monkeypatch.setattr(daemon, "START_S", 0.2)
        with pytest.raises(
            EngineUnavailable,
            match=r"in time and was ended\. Try again, or serve with",
        ):
            daemon.start_if_needed(place)
        with try_lock(place.life_lock) as held:
            assert held


def test_an_engine_that_another_process_starts_is_waited_for_no_longer_than_its_own_start(monkeypatch):
    with state_folder() as (place, _):
        place.prepare()
        monkeypatch.setattr(daemon, "START_S", 0.2)
        with try_lock(place.start_lock) as held:
            assert held
            for work in (lambda: daemon.start_if_needed(place), lambda: daemon.join(place, hello(), print)):
                with pytest.raises(EngineUnavailable, match=r"was not ready within 0\.2 s\. Try again, or serve with"):
                    work()


def test_an_engine_that_ends_without_a_word_is_told_with_its_status(monkeypatch):
    with state_folder() as (place, _):
        (Path(place.folder) / "sitecustomize.py").write_text("import os, sys\nif 'run' in sys.orig_argv: os._exit(7)\n")
        monkeypatch.setenv("PYTHONPATH", place.folder)
        with pytest.raises(EngineUnavailable, match=r"The engine ended with status 7\. Try again, or serve with"):
            daemon.start_if_needed(place)


def test_an_engine_whose_process_nobody_knows_is_left_to_the_user(monkeypatch):
    monkeypatch.setattr(daemon, "life_lock_holder", lambda place: 0)  # as where the system does not say
    with state_folder() as (place, _):
        with pytest.raises(EngineUnavailable, match=r"does not say which process holds .*; end it by its id"):
            daemon.kill(place, 1)


def test_an_engine_that_does_not_end_is_told_with_what_ends_it(monkeypatch):
    with state_folder() as (place, _):
        place.prepare()
        with place.listen() as listener, ThreadPoolExecutor(1) as apart:
            listener.setblocking(True)
            ending = apart.submit(daemon.stop, place, 0.1)
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b'{"pid": 1}\n')
                with pytest.raises(EngineUnavailable, match=r"did not end within 0\.1 s\. .*--force` ends it at once"):
                    ending.result(WAIT_S)
        os.unlink(place.socket)
        with subprocess.Popen([sys.executable, "-c", ""]) as gone:
            gone.wait(WAIT_S)
        with monkeypatch.context() as patched:  # as where a process waits for a disk that does not answer
            patched.setattr(daemon, "life_lock_holder", lambda place: gone.pid)
            with pytest.raises(EngineUnavailable, match=r"was killed and has not ended within 0\.1 s\. Wait, and try"):
                daemon.kill(place, 0.1)


def test_a_greeting_that_is_none_is_refused_and_hurts_nobody(shared):
    place, env = shared
    with Window(env) as open_window:
        for line in (b"\n", b"[]\n", b"x" * 100_000, b'{"kind": "tea"}\n', b'{"kind": "http"}\n'):
            connection = place.connect()
            with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(line)
                connection.shutdown(socket.SHUT_WR)
                told = connection.recv(65536)
                assert b"not greeted right; connect with `mlx-mcp serve`" in told or b"ends it" in told
        with pytest.raises(ConfigError, match="mlx-mcp engine stop"):
            greet(place, hello(kind="tea"))
        assert open_window.serves()
    wait_until(lambda: status(place)["connections"] == [])


def test_an_engine_whose_socket_was_taken_away_ends_once_it_is_idle(running):
    place, _ = running
    engine = status(place)["pid"]
    os.unlink(place.socket)
    wait_until(lambda: not is_alive(engine))


def test_processes_that_start_an_engine_at_once_start_one():
    with state_folder() as (place, env), ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda _: run(env, "engine", "start").stdout, range(4)))
        assert set(done) == {f"The engine is process {status(place)['pid']}.\n"}


# Who may


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be someone else")
def test_another_users_process_cannot_connect(shared):
    place, _ = shared
    code = (
        "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "c = socket.socket(socket.AF_UNIX); c.connect(sys.argv[1])\n"
        "print(c.recv(65536).decode())"
    )
    connect = [sys.executable, "-c", code, place.socket]
    shut = subprocess.run(connect, capture_output=True, text=True, timeout=WAIT_S)
    assert "PermissionError" in shut.stderr
    # Even where folder and socket stand open, the engine asks the kernel who is there.
    os.chmod(place.folder, 0o755)
    os.chmod(place.socket, 0o666)
    refused = subprocess.run(connect, capture_output=True, text=True, timeout=WAIT_S)
    assert json.loads(refused.stdout) == {
        "error": "This is another user's engine. Set MLX_MCP_STATE_DIR to a folder of your own."
    }
    os.chmod(place.folder, 0o700)
    os.chmod(place.socket, 0o600)
    assert re.search(r"of user\b.*\b65534", Path(place.log).read_text(), re.DOTALL)  # which wraps its lines


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be someone else")
def test_nothing_is_said_to_another_users_engine():
    with state_folder() as (place, env):
        code = (
            "import os, socket, sys; os.chmod(sys.argv[2], 0o777); os.setgid(65534); os.setuid(65534)\n"
            "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True); sys.stdin.read()"
        )
        foreign = subprocess.Popen(
            [sys.executable, "-c", code, place.socket, place.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with foreign:
            foreign.stdout.readline()
            os.chmod(place.folder, 0o700)
            done = refused(env)
            assert done.returncode == 2
            assert "a socket of user 65534, not your engine's socket" in done.stderr
            foreign.stdin.close()
        os.unlink(place.socket)


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_what_is_no_socket_of_ours_is_refused_and_left_alone(kind, tmp_path):
    with state_folder() as (place, env):
        victim = tmp_path / "victim"
        victim.write_text("precious")
        match kind:
            case "link":
                os.symlink(victim, place.socket)
            case "file":
                Path(place.socket).write_text("mine")
            case "folder":
                os.mkdir(place.socket)
        done = run(env, "serve")  # whose host is gone at once
        assert (done.returncode, done.stdout) == (2, "")
        words = {"link": "a symbolic link", "file": "a file", "folder": "a folder"}[kind]
        assert f"{place.socket} is {words}, not your engine's socket" in done.stderr
        assert os.path.lexists(place.socket)
        assert victim.read_text() == "precious"
        (os.rmdir if kind == "folder" else os.unlink)(place.socket)


def test_a_stale_socket_is_replaced():
    with state_folder() as (place, env):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(place.socket)
        with Window(env) as open_window:
            assert open_window.serves()


def test_a_folder_that_others_may_enter_is_refused():
    with state_folder() as (place, env):
        os.chmod(place.folder, 0o755)
        done = refused(env)
        assert done.returncode == 2
        assert f"chmod 700 {place.folder}" in done.stderr
        os.chmod(place.folder, 0o700)


@pytest.mark.long
def test_a_link_in_the_logs_place_is_not_written_through(tmp_path):
    with state_folder() as (place, env):
        victim = tmp_path / "victim"
        victim.write_text("precious")
        os.symlink(victim, place.log)
        with Window(env) as alone:
            assert alone.serves()
            alone.process.stdin.close()
            assert FALLBACK in alone.process.stderr.read().decode()
        assert victim.read_text() == "precious"


# Where no engine can be shared


SPOILT = {
    "no Unix sockets": ("import types, mlx_mcp.process.place as place; place.socket = types.SimpleNamespace()"),
    "no process can be started (Resource temporarily unavailable)": (
        "import subprocess\nclass Popen(subprocess.Popen):\n"
        "    def __init__(self, *_, **__): raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "subprocess.Popen = Popen"
    ),
    "the folder /proc/nowhere cannot be made": "import os; os.environ['MLX_MCP_STATE_DIR'] = '/proc/nowhere'",
}


@pytest.mark.long
@pytest.mark.parametrize("why", SPOILT)
def test_where_no_engine_can_be_shared_the_window_serves_alone_and_says_so(why):
    with state_folder() as (place, env):
        code = f"import sys; sys.argv = ['mlx-mcp', 'serve']\n{SPOILT[why]}\nfrom mlx_mcp.__main__ import main; main()"
        with Window(env, program=[sys.executable, "-c", code]) as alone:
            assert alone.serves()
            alone.process.stdin.close()
            said = alone.process.stderr.read().decode()
            assert why in said
            assert FALLBACK in said
        assert daemon.ask(place, "status") is None


@pytest.mark.long
def test_http_is_served_alone_where_no_engine_can_be_shared():
    env = os.environ | {"MLX_MCP_STATE_DIR": "/proc/nowhere"}
    arguments = command("serve", "--http", "--port", "0")
    with subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert FALLBACK in server.stderr.readline()
            assert "serving 'embedded' at http://127.0.0.1:" in server.stderr.readline()
        finally:
            server.terminate()
        assert server.wait(WAIT_S) == 0


SIGNALLED = """
import os, signal
from mlx_mcp.process import listener

class Ending:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        os.getpid()

def join(*_):
    Ending()
    os._exit(7)

listener.join = join
listener.hold(None, {}, listener.listen("127.0.0.1", 0), print, print, 1)
"""


def test_a_signal_that_comes_at_the_end_of_an_object_ends_a_listener_that_looks_for_an_engine():
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.long
def test_an_engine_that_cannot_listen_leaves_its_window_alone():
    # The child may not make sockets where its parent could not either: here only the child is told so.
    with state_folder() as (place, env):
        (Path(place.folder) / "sitecustomize.py").write_text(
            "import socket, sys\n"
            "if 'run' in sys.orig_argv:\n"
            "    def bind(*_): raise OSError(95, 'Operation not supported')\n"
            "    socket.socket.bind = bind\n"
        )
        spoilt = env | {"PYTHONPATH": os.pathsep.join([place.folder, env.get("PYTHONPATH", "")])}
        with Window(spoilt) as alone:
            assert alone.serves()
            alone.process.stdin.close()
            said = alone.process.stderr.read().decode()
            assert "Operation not supported" in said
            assert FALLBACK in said


def test_a_long_state_folder_has_its_socket_elsewhere(tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir(mode=0o700)
    env = os.environ | {"MLX_MCP_STATE_DIR": str(folder)}
    with Window(env) as open_window:
        assert open_window.serves()
        place = daemon.Place(str(folder))
        assert place.socket.startswith(f"/tmp/mlx-mcp-{os.getuid()}-")
        assert status(place)["pid"]
    daemon.stop(place, 30)
    shutil.rmtree(place.socket_folder)
