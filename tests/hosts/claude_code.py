"""Claude Code as processes that a test talks to, each with a home of its own, a scripted model and a server of ours."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import queue
import re
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hosts.endpoint import Endpoint, Json, Scene

WAIT_S = 60
KEY = "no-key-but-one-of-the-right-length-0123456789"
LOOK_S = 0.05
MENU_S = 1.0
SERVER = "mlx"  # what our server is called there
PROJECT = "project"  # the folder where it is started, in its home
PRINT = "--print --verbose --input-format stream-json --output-format stream-json".split()
ALLOWED = "mcp__mlx,Agent,ReadMcpResourceTool,Read,Bash(mlx-mcp:*)"


def command(program: Path, server: Json, home: Path) -> list[str]:
    """How it is started with one server, and a model that nobody asks it to know."""
    servers = json.dumps({"mcpServers": {SERVER: server}})
    chosen = ["--strict-mcp-config", "--mcp-config", servers, "--model", "scripted", "--allowedTools", ALLOWED]
    chosen += ["--permission-mode", "acceptEdits"]  # a command of a story writes a file in the project
    return [str(program), *chosen, "--debug-file", str(home / "debug.log")]


def environment(endpoint: Endpoint, home: Path, settings: dict[str, str]) -> dict[str, str]:
    """The test's environment without any host in it, with the endpoint for a model and an empty home."""
    of_hosts = ("CLAUDE", "ANTHROPIC", "XDG_", "MCP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(of_hosts)}
    return {
        **kept,
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": endpoint.url,
        "ANTHROPIC_API_KEY": KEY,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        **settings,
    }


class ClaudeCode:
    """A process in print mode, which goes on with one conversation as messages are written to it."""

    def __init__(self, program: Path, endpoint: Endpoint, server: Json, home: Path, **settings: str) -> None:
        (home / PROJECT).mkdir(parents=True)
        self.home = home
        self.endpoint = endpoint
        self.events: list[Json] = []
        self._lines: queue.Queue[Json | None] = queue.Queue()
        with (home / "stderr.log").open("w") as log:
            self._process: Any = subprocess.Popen(
                [*command(program, server, home), *PRINT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=home / PROJECT,
                env=environment(endpoint, home, settings),
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def _send(self, message: Json) -> None:
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def say(self, text: str) -> None:
        """Send what the user says."""
        self._send({"type": "user", "message": {"role": "user", "content": text}})

    def interrupt(self) -> None:
        """Stop what goes on, as Esc does."""
        self._send({"type": "control_request", "request_id": "stop", "request": {"subtype": "interrupt"}})

    def end_of_turn(self) -> Json:
        """The event with which the model's turn ends, when it has come."""
        deadline = time.monotonic() + WAIT_S
        while True:
            event = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            assert event is not None, f"Claude Code ended: {(self.home / 'stderr.log').read_text()}"
            self.events.append(event)
            if event["type"] == "result":
                return event

    def ask(self, text: str) -> str:
        """What the model says in the end to what the user says."""
        self.say(text)
        result = self.end_of_turn()
        assert not result["is_error"], result
        return str(result["result"])

    def play(self, scene: Callable[[], Scene]) -> str:
        """Have the model play a scene; returns its last words, and fails if a scene did."""
        self.endpoint.perform(scene.__name__, scene)
        words = self.ask(f"PLAY {scene.__name__}")
        self.endpoint.raise_what_failed()
        return words

    def log(self) -> str:
        """What it noted for whoever looks for faults."""
        return (self.home / "debug.log").read_text()

    def close(self) -> None:
        """End it as its host would: with the end of stdin."""
        self._process.stdin.close()
        try:
            self._process.wait(WAIT_S)
        finally:
            self._process.kill()
            self._reader.join(WAIT_S)
            self._process.stdout.close()


class Terminal:
    """Claude Code as a user has it before them: in a terminal, past its first questions."""

    def __init__(self, program: Path, endpoint: Endpoint, server: Json, home: Path, **settings: str) -> None:
        project = home / PROJECT
        project.mkdir(parents=True)
        known = {
            "hasCompletedOnboarding": True,
            "theme": "dark",
            "customApiKeyResponses": {"approved": [KEY[-20:]], "rejected": []},
            "projects": {str(project): {"hasTrustDialogAccepted": True}},
        }
        (home / ".claude.json").write_text(json.dumps(known))
        self.home = home
        self.endpoint = endpoint
        self._shown = bytearray()
        self._keys, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self._process = subprocess.Popen(
            command(program, server, home),
            stdin=screen,
            stdout=screen,
            stderr=screen,
            cwd=project,
            env=environment(endpoint, home, {"TERM": "xterm-256color", **settings}),
            start_new_session=True,
        )
        os.close(screen)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self._shown += os.read(self._keys, 65536)
            except OSError:  # the other end is closed
                return

    def shown(self) -> str:
        """All that it has shown, without colours, cursors and spaces, which it may draw in any order."""
        return re.sub(r"\x1b\[[0-9;?<>=]*[a-zA-Z]|\s", "", self._shown.decode(errors="replace"))

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so, and fail with what it has shown if it does not come."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            going_on = time.monotonic() < deadline and self._process.poll() is None
            assert going_on, self.shown()[-2000:]
            time.sleep(LOOK_S)

    def offers(self, mention: str) -> bool:
        """Whether its menu has a resource after `@` and the name of the server; leaves the line empty."""
        begun, typed = len(self.shown()), f"@{SERVER}"
        os.write(self._keys, typed.encode())
        deadline = time.monotonic() + MENU_S
        while mention not in self.shown()[begun:] and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        found = mention in self.shown()[begun:]
        os.write(self._keys, b"\x7f" * len(typed))
        return found

    def type(self, text: str) -> None:
        """Type a line, look that it is there, and press Enter."""
        os.write(self._keys, text.encode())
        self.until(lambda: "".join(text.split()) in self.shown())
        os.write(self._keys, b"\r")

    def close(self) -> None:
        """Close the window."""
        self._process.terminate()
        try:
            self._process.wait(WAIT_S)
        finally:
            self._process.kill()
            self._reader.join(WAIT_S)
            os.close(self._keys)
