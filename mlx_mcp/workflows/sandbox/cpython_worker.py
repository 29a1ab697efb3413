"""One CPython process, driven from host call to host call.

Nothing that comes from the process is trusted: types and sizes are checked, and a message that is not as it should be
ends the process, as do a turn that takes too long, a task that is cancelled, and `close`. `load` starts another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import IO, Any

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox import dumps
from mlx_mcp.workflows.sandbox.cpython_process import FAILED, Command, CPythonProcess
from mlx_mcp.workflows.sandbox.explaining import (
    CPYTHON_HINTS,
    ENDED,
    explain,
    raisable,
    spoiled,
    too_much_memory,
    too_much_output,
    too_slow,
)
from mlx_mcp.workflows.sandbox.frames import Malformed, read_bytes, read_message, write_bytes, write_message
from mlx_mcp.workflows.sandbox.journal import tagged, untagged
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits
from mlx_mcp.workflows.sandbox.values import plain, sendable

TURN_GRACE_S = 30.0  # for inputs, dumps and looks at variables
MAX_VARIABLES, MAX_LINE_CHARS = 10_000, 300  # that are told


class CPythonWorker:
    """One process, and what is known of the program that runs in it."""

    def __init__(
        self,
        command: Command,
        version: str,
        limits: Limits,
        functions: Collection[str],
        on_close: Callable[[CPythonWorker], None],
    ) -> None:
        """`on_close` is called with the worker when it is closed."""
        self._command, self._version, self._limits, self._on_close = command, version, limits, on_close
        self._functions = frozenset(functions)
        self._process: CPythonProcess | None = None
        self._waiting = False  # a program waits for its host call
        self._left_s = 0.0  # of the program's time
        self._printed: list[str] = []
        self._num_printed = 0  # characters of the run

    async def begin(self) -> None:
        """Start the process.

        Raises:
            SandboxFailed: it does not start.
        """
        process = CPythonProcess(self._command)
        self._process = process
        try:
            await process.start()
        except BaseException:
            self._process = None
            raise

    async def run(self, code: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
        """See `Worker.run`."""
        assert not self._waiting, "a program is still waiting for its host call"
        moment = time.time() if moment is None else moment
        self._num_printed = 0
        if inputs:  # which take seconds by tens of megabytes, and these are not the program's
            self._left_s = TURN_GRACE_S
            given = await self._turn(lambda: {"do": "give", "inputs": tagged(sendable(dict(inputs)))})
            if isinstance(given, HostCall) or given.spoiled:
                return given
        self._left_s = self._limits.seconds
        return await self._turn(lambda: {"do": "run", "code": code, "moment": moment})

    async def answer(self, value: Any) -> HostCall | Ended:
        """See `Worker.answer`."""
        return await self._turn(lambda: {"do": "answer", "value": tagged(sendable(value))})

    async def refuse(self, type: str, message: str) -> HostCall | Ended:
        """See `Worker.refuse`."""
        type, message = raisable(type, message)
        return await self._turn(lambda: {"do": "refuse", "type": type, "message": sendable(message)})

    async def dump(self) -> bytes:
        """See `Worker.dump`: all state between two runs.

        Raises:
            SandboxFailed: a program waits in a host call, or the process has ended.
        """
        if self._waiting:
            raise SandboxFailed("A program in CPython cannot be kept while it waits for an answer. Let it end first.")
        if self._process is None:
            raise SandboxFailed(ENDED)
        try:
            num_runs, state = await self._process.do(self._dumped, TURN_GRACE_S)
        except (*FAILED, TimeoutError) as exc:
            await self._end()
            raise SandboxFailed(ENDED) from exc
        return dumps.made({"version": self._version, "num_runs": num_runs}, state)

    async def load(self, dump: bytes) -> HostCall | None:
        """See `Worker.load`. No program waits in what is loaded."""
        found, state = dumps.opened(dump, self._version)
        await self._end()
        await self.begin()
        assert self._process is not None

        def loaded(to: IO[bytes], of: IO[bytes]) -> str:
            write_message(to, {"do": "load", "num_runs": found.get("num_runs", 0)})
            write_bytes(to, state)
            answer = read_message(of)
            return "" if answer.get("kind") == "loaded" else _text(answer.get("why"))

        try:
            why = await self._process.do(loaded, TURN_GRACE_S)
        except (*FAILED, TimeoutError) as exc:
            await self._end()
            raise SandboxFailed(dumps.DAMAGED) from exc
        if why:
            await self._end()
            raise SandboxFailed(f"{dumps.DAMAGED} CPython says: {why[:MAX_LINE_CHARS]}")
        return None

    async def variables(self) -> dict[str, str]:
        """See `Worker.variables`. One that did not outlive its run is told once."""
        assert not self._waiting, "the variables of a program that waits are not looked at"
        if self._process is None:
            return {}
        try:
            return await self._process.do(_variables, TURN_GRACE_S)
        except (*FAILED, TimeoutError):
            await self._end()
            return {}

    def take_output(self) -> str:
        """See `Worker.take_output`."""
        printed, self._printed = self._printed, []
        return "".join(printed)

    async def close(self) -> None:
        """See `Worker.close`."""
        await self._end()
        self._on_close(self)

    async def _end(self) -> None:
        """End the process, whatever it does. `load` starts another one."""
        process, self._process, self._waiting = self._process, None, False
        if process is not None:
            await process.end()

    # -- one turn of the program --

    async def _turn(self, request: Callable[[], dict[str, Any]]) -> HostCall | Ended:
        """Take the program to its next host call or its end, and say how it ended."""
        if self._process is None:
            return spoiled(ENDED)
        began = time.monotonic()
        step: HostCall | Ended
        try:
            step = await self._process.do(lambda to, of: self._exchanged(request(), to, of), self._left_s)
        except TimeoutError:
            step = too_slow(self._limits)
        except FAILED:
            step = spoiled(ENDED)
        except BaseException:
            await self._end()
            raise
        self._left_s = max(0.0, self._left_s - (time.monotonic() - began))
        self._waiting = isinstance(step, HostCall)
        if isinstance(step, Ended) and step.spoiled:
            await self._end()
        return step

    # -- on the thread of the process --

    def _exchanged(self, request: dict[str, Any], to: IO[bytes], of: IO[bytes]) -> HostCall | Ended:
        write_message(to, request)
        while True:
            said = read_message(of)
            match said.get("kind"):
                case "printed":
                    self._take(_text(said.get("text")))
                case "call":
                    return self._call(said)
                case "ended":
                    return self._ended(said)
                case _:
                    raise Malformed("nobody asked for this")

    def _take(self, text: str) -> None:
        self._num_printed += len(text)
        if self._num_printed > self._limits.output_chars:
            raise Malformed("more than the process may print")
        self._printed.append(sendable(text))

    def _call(self, said: dict[str, Any]) -> HostCall:
        name = _text(said.get("name"))
        match _value(said.get("arguments")):
            case [list(args), dict(kwargs)] if name in self._functions and all(isinstance(key, str) for key in kwargs):
                return HostCall(name, tuple(args), kwargs)
        raise Malformed("no call of a function that there is")

    def _ended(self, said: dict[str, Any]) -> Ended:
        match said.get("limit"):
            case "output":
                return too_much_output(self._limits)
            case "memory":
                return too_much_memory(self._limits)
        match said.get("error"):
            case None:
                return Ended(_value(said.get("value")))
            case {"type": str(type), "message": str(message), "line": int() | None as line}:
                told = sendable(type), sendable(message)
                return Ended(error=explain(*told, line, CPYTHON_HINTS))
        raise Malformed("no exception")

    def _dumped(self, to: IO[bytes], of: IO[bytes]) -> tuple[int, bytes]:
        """How many runs there were, and what the process wrote of its variables, which is never read here."""
        write_message(to, {"do": "dump"})
        said = read_message(of)
        num_runs = said.get("num_runs")
        if said.get("kind") != "state" or not isinstance(num_runs, int):
            raise Malformed("no state")
        return num_runs, read_bytes(of, self._limits.memory_bytes)


def _variables(to: IO[bytes], of: IO[bytes]) -> dict[str, str]:
    write_message(to, {"do": "variables"})
    said = read_message(of)
    lines = said.get("lines")
    if said.get("kind") != "variables" or not isinstance(lines, dict):
        raise Malformed("no variables")
    shown = list(lines.items())[:MAX_VARIABLES]
    return {sendable(name)[:MAX_LINE_CHARS]: sendable(_text(line))[:MAX_LINE_CHARS] for name, line in shown}


def _text(said: Any) -> str:
    if not isinstance(said, str):
        raise Malformed("no text")
    return said


def _value(said: Any) -> Any:
    """A value that the process wrote: what may leave a sandbox, and nothing else."""
    try:
        return sendable(plain(untagged(said)))
    except (ValueError, TypeError, RecursionError) as exc:
        raise Malformed("no value") from exc
