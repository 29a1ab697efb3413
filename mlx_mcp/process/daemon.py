"""Finds the user's engine process or starts it, asks it for its status, and ends it.

Guarantees:
    - Of any number of processes that look for an engine at once, one starts it: whoever holds the start lock.
    - Two engines never live at once in one state folder: each holds the life lock until its process has ended, and a
      new one waits for that before it loads anything.
    - The engine outlives whoever started it: a session of its own, its output in a log, no descriptor of its parent's.
    - Every wait has a bound, and an error that ends with what the engine last said.

Knows nothing of MCP. Imported by the relay: standard library only, and little of that.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

from mlx_mcp import __version__
from mlx_mcp.errors import ConfigError, EngineUnavailable, NoSharedEngine
from mlx_mcp.process import endings
from mlx_mcp.process.environment import engine_environment
from mlx_mcp.process.locks import POLL_S, life_lock_holder, try_lock
from mlx_mcp.process.place import Place, peer

START_S = 90.0  # the imports take 3 s on a quiet machine
ANSWER_S = 15.0
SAY_S = 3.0  # after this time the user is told that an engine does not answer
SAY_START_S = 10.0  # after this time the user is told that an engine has to start or to end first
LOOK_S = 0.2
MAX_LOG_BYTES = 1 << 20
NO_SOCKETS = 3  # the exit status of an engine that cannot listen here
FORCE_S = 5.0  # how long an engine that is to be killed may take to answer first


class Joined:
    """A connection that the engine has accepted, and its reply."""

    def __init__(self, connection: socket.socket, reply: dict[str, object]) -> None:
        self.connection, self.reply = connection, reply


def join(place: Place, hello: dict[str, object], say: Callable[[str], None], fds: tuple[int, ...] = ()) -> Joined:
    """Connect to the engine. Start it if there is none, and wait for one that ends so that ours can start.

    `say` is told what is waited for, if that takes long, and the notes of the engine.

    Raises:
        NoSharedEngine: there can be no engine process here.
        EngineUnavailable: it does not start or answer, or something else is in its place.
        ConfigError: it refuses our settings.
    """
    place.prepare()
    began = time.monotonic()
    told, slow = "", False
    while True:
        joined = greet(place, hello, fds, say)
        if joined is not None:
            if "leaving" not in joined.reply:
                for note in list(joined.reply.get("notes") or ()):  # type: ignore[call-overload]
                    say(str(note))
                return joined
            joined.connection.close()
            if told != joined.reply["leaving"]:
                told = str(joined.reply["leaving"])
                say(told)
        with try_lock(place.start_lock) as held:
            if held and place.listener_pid() is None:
                start(place, began + START_S, say)
                continue
        waited = time.monotonic() - began
        if waited > START_S:
            raise EngineUnavailable(
                f"The engine was not ready within {START_S:g} s. Try again, or serve with --standalone. {tail(place)}"
            )
        if waited > SAY_START_S and not slow:
            slow = True
            say("waiting for the engine that another process starts, or that is about to end")
        time.sleep(POLL_S)


def greet(
    place: Place,
    hello: dict[str, object],
    fds: tuple[int, ...] = (),
    say: Callable[[str], None] = lambda _: None,
    answer_s: float | None = None,
) -> Joined | None:
    """Send a hello to a running engine, and descriptors with it; None if there is no engine, or it is about to end.

    The engine has `answer_s` to answer, or ANSWER_S. `say` is told if it takes longer than SAY_S.

    Raises:
        EngineUnavailable: it does not answer, or something else is in its place.
        ConfigError: it refuses our settings.
    """
    connection = place.connect()
    if connection is None:
        return None
    answer_s = ANSWER_S if answer_s is None else answer_s
    connection.settimeout(answer_s)
    line = json.dumps(hello).encode() + b"\n"
    answer = b""
    pid = 0
    try:
        pid = peer(connection)[0]
        sent = socket.send_fds(connection, [line], fds) if fds else 0
        if sent < len(line):  # to send nothing fails, too, once the engine has answered and hung up
            connection.sendall(line[sent:])
        if answer_s > SAY_S and not select.select([connection], [], [], SAY_S)[0]:
            say(f"waiting for the engine, process {pid or '?'}, which does not answer")
            connection.settimeout(answer_s - SAY_S)
        while not answer.endswith(b"\n"):
            # To the end of the line and no further: what comes after is for whoever gets the connection.
            piece = connection.recv(65536, socket.MSG_PEEK)
            if not piece:
                break
            answer += connection.recv(piece.find(b"\n") + 1 or len(piece))
        reply = json.loads(answer)
    except TimeoutError as error:
        connection.close()
        raise EngineUnavailable(
            f"The engine, process {pid or '?'}, does not answer within {answer_s:g} s: it was stopped, or it hangs. "
            f"`mlx-mcp engine stop --force` ends it; then try again, and another is started. {tail(place)}"
        ) from error
    except (OSError, ValueError):
        connection.close()
        return None
    connection.settimeout(None)
    if "error" in reply:
        connection.close()
        raise ConfigError(str(reply["error"]))
    return Joined(connection, reply)


def kill(place: Place, timeout_s: float) -> int | None:
    """End the engine even if it hangs or was stopped, by SIGKILL if it does not answer; returns its id, or None.

    Sessions that were persisted and blocks on disk are there again when the next engine starts.

    Raises:
        EngineUnavailable: nobody knows which process it is, or it did not end within `timeout_s`.
    """
    import signal

    with contextlib.suppress(EngineUnavailable):
        if (pid := stop(place, timeout_s, FORCE_S)) is not None:
            return pid
    pid = life_lock_holder(place)
    if pid is None:
        return None
    if not pid:
        raise EngineUnavailable(f"The system does not say which process holds {place.life_lock}; end it by its id.")
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + timeout_s
    while life_lock_holder(place) is not None:
        if time.monotonic() > deadline:
            raise EngineUnavailable(
                f"Process {pid} was killed and has not ended within {timeout_s:g} s. Wait, and try again."
            )
        time.sleep(POLL_S)
    endings.end(place)
    return pid


def ask(place: Place, kind: str) -> dict[str, object] | None:
    """The running engine's answer to a question; None if there is no engine.

    Raises:
        EngineUnavailable: it does not answer.
    """
    joined = greet(place, {"kind": kind, "version": __version__})
    if joined is None:
        return None
    joined.connection.close()
    return joined.reply


def stop(place: Place, timeout_s: float, answer_s: float | None = None) -> int | None:
    """End the running engine, and wait until its process has ended; returns its id, None if there was no engine.

    Raises:
        EngineUnavailable: it did not answer, or did not end within `timeout_s`.
    """
    joined = greet(place, {"kind": "stop", "version": __version__}, answer_s=answer_s)
    if joined is None:
        return None
    pid = int(str(joined.reply["pid"]))
    with joined.connection as connection:
        connection.settimeout(timeout_s)
        try:
            connection.recv(1)  # the system closes it when the process has ended
        except TimeoutError as error:
            raise EngineUnavailable(
                f"Process {pid} did not end within {timeout_s:g} s. `mlx-mcp engine stop --force` ends it at once. "
                f"{tail(place)}"
            ) from error
        except ConnectionResetError:
            pass
    return pid


def start_if_needed(place: Place, say: Callable[[str], None] = lambda _: None) -> int:
    """The id of the engine process, which is started if there is none.

    Raises:
        NoSharedEngine: there can be no engine process here.
        EngineUnavailable: it does not start or answer.
    """
    place.prepare()
    deadline = time.monotonic() + START_S
    while (reply := ask(place, "status")) is None:
        with try_lock(place.start_lock) as held:
            if held and place.listener_pid() is None:
                start(place, deadline, say)
                continue
        if time.monotonic() > deadline:
            raise EngineUnavailable(
                f"The engine was not ready within {START_S:g} s. Try again, or serve with --standalone. {tail(place)}"
            )
        time.sleep(POLL_S)
    return int(str(reply["pid"]))


def start(place: Place, deadline: float, say: Callable[[str], None]) -> None:
    """Start an engine process, and wait until it listens. Only the holder of the start lock may call this.

    `say` is told if that takes longer than SAY_START_S.

    Raises:
        NoSharedEngine: there can be no engine process here.
        EngineUnavailable: it ended, or was not ready by the deadline.
    """
    import subprocess

    log = open_log(place)
    began = os.fstat(log).st_size
    ready, tell = os.pipe()
    command = [sys.executable, "-m", "mlx_mcp", "engine", "run", "--ready-fd", str(tell)]
    try:
        # A new program, never a fork: threads and MLX do not survive one. Not in the window's folder, which would come
        # first on the module path, and could not be unmounted.
        engine = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=place.folder,
            env=engine_environment(place),
            start_new_session=True,
            pass_fds=(tell,),
        )
    except OSError as error:
        os.close(ready)
        raise NoSharedEngine(f"no process can be started ({error.strerror})") from error
    finally:
        os.close(tell)
        os.close(log)
    tell_at = time.monotonic() + SAY_START_S
    try:
        while not select.select([ready], [], [], LOOK_S)[0]:
            if time.monotonic() > tell_at:
                tell_at = deadline + LOOK_S  # once
                say(f"waiting for the engine, process {engine.pid}, to start; it writes to {place.log}")
            # One whose starter was killed may have come up meanwhile; ours waits for that one's end.
            late, useless = time.monotonic() > deadline, place.listener_pid() not in (None, 0, engine.pid)
            if late or useless:
                engine.kill()
                engine.wait()
            if useless:
                return
            if late:
                raise EngineUnavailable(
                    f"The engine was not ready in time and was ended. Try again, or serve with --standalone. "
                    f"{tail(place, began)}"
                )
        if os.read(ready, 16):
            # If this process outlives the engine, it has to collect the engine's exit status from the system.
            def collect() -> None:
                endings.note_end(place, engine.pid, engine.wait())

            threading.Thread(target=collect, name="engine's end", daemon=True).start()
            return
        status = engine.wait()
    finally:
        os.close(ready)
    said = tail(place, began, label="")
    if status == NO_SOCKETS:
        raise NoSharedEngine(said.removeprefix("mlx-mcp: "))
    if said:
        raise EngineUnavailable(f"The engine did not start. Correct what it says: {said}")
    raise EngineUnavailable(f"The engine ended with status {status}. Try again, or serve with --standalone.")


def open_log(place: Place) -> int:
    """Open the log to append to it. If it has become long, it is renamed first."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(place.log).st_size > MAX_LOG_BYTES:
            os.replace(place.log, f"{place.log}.1")
    try:
        return os.open(place.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NoSharedEngine(f"the log {place.log} cannot be written ({error.strerror})") from error


def tail(place: Place, since: int | None = None, lines: int = 12, label: str = "Its log ends: ") -> str:
    """The last lines of the log after byte `since`, with a label before them; empty if there are none."""
    try:
        with open(place.log, "rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(end - 8192, since or 0))
            text = log.read().decode("utf-8", "replace").strip()
    except OSError:
        text = ""
    said = "\n".join(text.splitlines()[-lines:])
    return f"{label}{said}" if said else ""
