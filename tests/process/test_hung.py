"""An engine process that was suspended, as seen by windows, by the HTTP listener and by `engine stop`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request

import pytest

from mlx_mcp.process import listener as listener_module
from mlx_mcp.process.listener import listen, refuse
from tests.process.test_one_engine import HttpListener, said
from tests.process.windows import WAIT_S, Window, command, is_alive, run, state_folder, status, wait_until

QUICK = {"MLX_MCP_ENGINE_SILENCE_S": "6"}


@contextlib.contextmanager
def suspended(pid):
    """The process does nothing until the end of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_windows_say_that_their_engine_hangs_and_go_on_with_another_once_it_was_ended_by_force():
    with state_folder(**QUICK) as (place, env), Window(env) as window:
        engine = status(place)["pid"]
        with suspended(engine):
            params = {"name": "list_sessions", "arguments": {}, "_meta": {"progressToken": 5}}
            call, ping = window.request("tools/call", **params), window.request("ping")
            failed = window.answer(call)["result"]
            assert failed["isError"]
            assert f"process {engine}" in failed["content"][0]["text"]
            assert "mlx-mcp engine stop --force" in failed["content"][0]["text"]
            assert "mlx-mcp engine stop --force" in window.answer(ping)["error"]["message"]
            progress = [m["params"] for m in window.others if m["method"] == "notifications/progress"]
            assert [p["progressToken"] for p in progress] == [5]
            assert "no sign of life for 5 s" in progress[0]["message"]

            new = subprocess.Popen(command("serve"), env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert f"waiting for the engine, process {engine}" in new.stderr.readline()
            stopped = run(env, "engine", "stop", "--force")
            assert (stopped.returncode, stopped.stdout) == (0, f"Process {engine} has ended.\n")
            new.stdin.close()
            assert new.wait(WAIT_S) == 0  # it has found another
            new.stderr.close()
        assert window.generate()["text"] == "771"
        assert status(place)["pid"] != engine


@pytest.mark.slow  # test_relay.py has the same in one process
def test_a_window_whose_engine_shows_life_again_uses_it():
    with state_folder(**QUICK) as (place, env), Window(env) as window:
        engine = status(place)["pid"]
        window.generate()
        with suspended(engine):
            assert window.answer(window.call("generate", prompt="What is 1?", keep=True))["result"]["isError"]
        assert window.generate()["text"] == "771"
        assert status(place)["pid"] == engine
        # The call that was given up was cancelled, and left no session behind.
        wait_until(lambda: status(place)["rows"] == status(place)["waiting"] == 0)


def test_an_engine_that_is_ending_and_hangs_is_ended_by_force_too():
    with state_folder() as (place, env):
        assert run(env, "engine", "start").returncode == 0
        engine = place.listener_pid()
        with suspended(engine):
            os.unlink(place.socket)
            assert run(env, "engine", "stop", "--force").stdout == f"Process {engine} has ended.\n"
            assert not is_alive(engine)
        assert run(env, "engine", "stop", "--force").stdout == "There is no engine process.\n"


@pytest.mark.slow  # the test of windows ends one that does not
def test_an_engine_that_answers_is_stopped_by_force_as_without():
    with state_folder() as (place, env), Window(env) as window:
        window.generate()
        engine = status(place)["pid"]
        assert run(env, "engine", "stop", "--force").stdout == f"Process {engine} has ended.\n"
        with open(place.log) as log:
            assert "Traceback" not in log.read()


@pytest.mark.long
def test_a_listener_says_that_its_engine_hangs_and_so_does_every_new_connection():
    with state_folder(**QUICK) as (place, env), HttpListener(env) as listener:
        health = listener.address.removesuffix("/mcp") + "/health"
        engine = status(place)["pid"]
        with suspended(engine):
            assert "mlx-mcp engine stop --force" in said(listener.process.stderr, "no sign of life")
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(health, timeout=WAIT_S)
            assert refused.value.code == 503
            assert f"process {engine}" in json.load(refused.value)["error"]
        said(listener.process.stderr, "shows life again")
        assert json.load(urllib.request.urlopen(health, timeout=WAIT_S))["status"] == "ok"


def test_who_goes_on_sending_to_a_listener_whose_engine_hangs_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(listener_module, "TICK_S", 0.2)
    refused = threading.Event()
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:

        def send():
            with contextlib.suppress(OSError):  # it has hung up
                while not refused.wait(0.02):
                    client.sendall(b"x")

        sending = threading.Thread(target=send)
        sending.start()
        refuse(listener, "It hangs.")
        refused.set()
        sending.join(WAIT_S)
        with contextlib.suppress(ConnectionResetError):  # what was sent last was not read
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
