"""Windows as hosts open them: relays on one engine in a state folder of the test's own."""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlx_mcp.process.daemon import ask, stop
from mlx_mcp.process.locks import try_lock
from mlx_mcp.process.place import Place

WAIT_S = 60
INITIALIZE = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "1"},
}
# The newer era has no handshake: every request says who asks.
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
ERAS = ["legacy", "modern"]
LONG = {"prompt": "Count from 1 to 99.", "max_tokens": 400, "regex": "[0-9, ]{800}", "temperature": 1.0}


@contextlib.contextmanager
def state_folder(**settings: str) -> Iterator[tuple[Place, dict[str, str]]]:
    """A place for one engine, which is ended with the test; and the environment that leads there."""
    folder = tempfile.mkdtemp(prefix="mlx-")  # short: a socket's path has a limit
    place = Place(folder)
    try:
        yield place, os.environ | {"MLX_MCP_STATE_DIR": folder} | settings
    finally:
        wait_until(lambda: ended(place))
        shutil.rmtree(folder)


def ended(place: Place) -> bool:
    """End the place's engine, also one that is only just starting; whether there is none."""
    stop(place, 30)
    with try_lock(place.life_lock) as free:
        return free


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mlx_mcp", *arguments]


def run(env: Mapping[str, str], *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=env,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        stdin=subprocess.DEVNULL,
        **options,
    )


def refused(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`mlx-mcp serve` of a host that leaves once it has been told on stderr why there is no engine for it.

    A window whose host is gone waits for an engine that is just being started for EXIT_S only.
    """
    with subprocess.Popen(command("serve", *arguments), stdin=-1, stdout=-1, stderr=-1, env=env, text=True) as window:
        assert window.stderr is not None
        said = ""
        for line in window.stderr:
            said += line
            if "Calls are answered with this" in line:
                break
        out, rest = window.communicate(timeout=WAIT_S)
        return subprocess.CompletedProcess(window.args, window.returncode, out, said + rest)


class Window:
    """One host and its relay. Answers are read as they come, and waited for with a bound."""

    def __init__(
        self,
        env: Mapping[str, str],
        *arguments: str,
        era: str = "legacy",
        handshake: bool = True,
        program: list[str] | None = None,
        **options: Any,
    ) -> None:
        self.era = era
        self.process: Any = subprocess.Popen(  # whose pipes are there
            program or command("serve", *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            **options,
        )
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.others: list[dict[str, Any]] = []  # what is no answer
        self.answers: dict[Any, dict[str, Any]] = {}
        self.id = 0
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if handshake:
            self.handshake()
            self.answer(self.request("resources/read", uri="mlx://stats"))  # which waits for the engine

    def _read(self) -> None:
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def send(self, message: bytes | dict[str, Any]) -> None:
        self.process.stdin.write((message if isinstance(message, bytes) else json.dumps(message).encode()) + b"\n")
        self.process.stdin.flush()

    def handshake(self) -> None:
        if self.era == "legacy":
            assert "result" in self.answer(self.request("initialize", **INITIALIZE))
            self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def request(self, method: str, **params: Any) -> int:
        """Send a request; returns its id."""
        self.id += 1
        if self.era == "modern":
            params["_meta"] = META
        self.send({"jsonrpc": "2.0", "id": self.id, "method": method, "params": params})
        return self.id

    def call(self, tool: str, **arguments: Any) -> int:
        return self.request("tools/call", name=tool, arguments=arguments)

    def answer(self, id_: Any) -> dict[str, Any]:
        """The answer to a request; there is no second one."""
        deadline = time.monotonic() + WAIT_S
        while id_ not in self.answers:
            message = self.lines.get(timeout=max(0.01, deadline - time.monotonic()))
            assert message is not None, self.process.stderr.read()
            if "method" in message:
                self.others.append(message)
            else:
                assert message["id"] not in self.answers, "answered twice"
                self.answers[message["id"]] = message
        return self.answers[id_]

    def ask(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """A tool's structured result."""
        result = self.answer(self.call(tool, **arguments))["result"]
        assert not result.get("isError"), result
        structured: dict[str, Any] = result["structuredContent"]
        return structured

    def generate(
        self, prompt: str = "Alice's badge is 771. What is Alice's badge?", **arguments: Any
    ) -> dict[str, Any]:
        return self.ask("generate", prompt=prompt, **arguments)

    def serves(self) -> bool:
        """Whether a call is answered; no model is loaded for that."""
        return "sessions" in self.ask("list_sessions")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def close(self) -> int:
        """Close as a host does, with the end of stdin; returns the exit status."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return int(self.process.wait(WAIT_S))
        finally:
            self.process.kill()
            self.reader.join(WAIT_S)  # another process may hold the other end of stdout for a moment
            self.process.stdout.close()
            self.process.stderr.close()

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def status(place: Place) -> dict[str, Any]:
    """What the engine says of itself; one that is being started is waited for."""
    wait_until(lambda: ask(place, "status") is not None)
    state = ask(place, "status")
    assert state is not None
    return state


def wait_until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Look again and again: what another process makes true has no event here."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    return ps("stat", pid)[:1] not in ("", "Z")


def resident_mb(pid: int) -> float:
    return int(ps("rss", pid)) / 1000


def ps(what: str, pid: int) -> str:
    """What the system says of a process; nothing if there is none."""
    return subprocess.run(["ps", "-o", f"{what}=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
