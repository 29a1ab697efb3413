"""The child's loop: requests come in by one pipe, and what becomes of them goes out by another.

The pipes are moved away from where programs write. What a hostile program writes to them all the same is for the other
side to judge, which trusts nothing that comes from here.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

from mlx_mcp.workflows.sandbox.child.confining import confine
from mlx_mcp.workflows.sandbox.child.program import End, Interpreter, Output
from mlx_mcp.workflows.sandbox.child.variables import restore
from mlx_mcp.workflows.sandbox.frames import (
    MAX_MESSAGE_BYTES,
    encoded,
    read_bytes,
    read_message,
    write_bytes,
    write_message,
)
from mlx_mcp.workflows.sandbox.journal import tagged, untagged
from mlx_mcp.workflows.sandbox.values import TooLarge, plain, sendable

NO_LIMIT = 1 << 32  # of what this process is sent
TOO_LONG = f"the value is longer than {MAX_MESSAGE_BYTES >> 20} MiB. Use a part of it"


def main() -> None:
    """Serve until the pipe of requests is closed."""
    options = json.loads(sys.argv.pop())
    requests, answers = _pipes()
    confine(options["memory_bytes"], options["file_bytes"])
    scratch = Path(options["scratch"]) if options["scratch"] else None
    try:
        child = Child(requests, answers)
        output = Output(child.printed, options["output_chars"])
        child.serve(Interpreter(child.called, output, scratch, options["memory_bytes"]), options["functions"])
    except (EOFError, OSError):  # the other side has ended
        pass
    finally:
        os._exit(0)  # whatever threads of programs still do


def _pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes, in places where programs do not write by mistake."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    return requests, answers


class Child:
    """The two pipes. The interpreter between them calls `called` and `printed`."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests, self._answers = requests, answers
        self._calling, self._writing = threading.Lock(), threading.RLock()
        self._running = False

    def serve(self, interpreter: Interpreter, functions: list[str]) -> None:
        """Answer requests.

        Raises:
            EOFError: there will be no more.
        """
        interpreter.equip(functions)
        self._say(kind="ready")
        while True:
            request = read_message(self._requests, NO_LIMIT)
            match request.pop("do"):
                case "give":
                    self._give(interpreter, request["inputs"])
                case "run":
                    self._run(interpreter, request["code"], request["moment"])
                case "dump":
                    self._say(kind="state", num_runs=interpreter.num_runs)
                    write_bytes(self._answers, interpreter.state)
                case "load":
                    self._load(interpreter, read_bytes(self._requests, NO_LIMIT), request["num_runs"])
                case "variables":
                    self._say(kind="variables", lines=sendable(interpreter.variables()))

    def _give(self, interpreter: Interpreter, inputs: Any) -> None:
        try:
            interpreter.namespace.update(untagged(inputs))
        except MemoryError:
            self._say(kind="ended", limit="memory")
        else:
            self._say(kind="ended")

    def _run(self, interpreter: Interpreter, code: str, moment: float) -> None:
        self._running = True
        end = interpreter.run(code, moment)
        self._running = False
        value = tagged(sendable(end.value))
        if len(encoded(value)) > MAX_MESSAGE_BYTES - 1024:
            value = f"<{type(end.value).__name__}: {TOO_LONG}>"
        self._say(kind="ended", value=value, error=_told(end), limit=end.limit)

    def _load(self, interpreter: Interpreter, state: bytes, num_runs: int) -> None:
        try:
            restore(interpreter.namespace, state)
            interpreter.state, interpreter.num_runs = state, num_runs
        except BaseException as error:  # of classes of programs
            self._say(kind="failed", why=f"{type(error).__name__}: {error}"[:500])
        else:
            self._say(kind="loaded")

    def called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ask the host, and wait. Threads of a program ask one after the other."""
        with self._calling:
            if not self._running:
                raise RuntimeError(f"{name} was called while no program runs")
            try:
                said = tagged(sendable(plain([list(args), kwargs])))
            except TooLarge as error:
                raise ValueError(f"{name}(): {error}") from None
            if len(encoded(said)) > MAX_MESSAGE_BYTES - 1024:
                raise ValueError(f"{name}(): {TOO_LONG}")
            sys.stdout.flush()
            self._say(kind="call", name=name, arguments=said)
            answer = read_message(self._requests, NO_LIMIT)
        if answer["do"] == "refuse":
            refused: BaseException = getattr(builtins, answer["type"])(*filter(None, [answer["message"]]))
            raise refused
        return untagged(answer["value"])

    def printed(self, text: str) -> None:
        """Send what a program printed."""
        self._say(kind="printed", text=text)

    def _say(self, **message: Any) -> None:
        with self._writing:
            write_message(self._answers, message)


def _told(end: End) -> dict[str, Any] | None:
    """The exception as it is sent: no longer than anybody reads."""
    if end.error is None:
        return None
    return end.error | {name: sendable(str(end.error[name])[:10_000]) for name in ("type", "message")}
