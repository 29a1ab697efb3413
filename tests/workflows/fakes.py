"""A stand-in for the interpreter of sandboxes: a program is a generator of the test, which yields its host calls.

    def counts_words(v, say):
        v["counts"] = yield HostCall("llm_map", ("Count the words.", v["texts"]))
        say(f"{len(v['counts'])} texts")
        return sum(v["counts"])

    runtime = FakeRuntime({"count": counts_words})      # `count` is the code that runs it

`v` are the sandbox's variables, and `say` prints. A program that raises Spoil has broken a limit. A dump is the
variables as JSON, and while a program waits in a host call also what it was told so far, so that it can be run again.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits, ProgramError, Worker

Program = Callable[[dict[str, Any], Callable[[str], None]], Generator[HostCall, Any, Any]]


class Spoil(Exception):
    """The program breaks a limit of time or memory."""


@dataclass
class FakeWorker:
    """Runs the programs of its runtime; `loaded` are the dumps that it was given."""

    runtime: FakeRuntime
    limits: Limits
    functions: Collection[str]
    values: dict[str, Any] = field(default_factory=dict)
    loaded: list[bytes] = field(default_factory=list)
    closed: bool = False
    _output: list[str] = field(default_factory=list)
    _running: Generator[HostCall, Any, Any] | None = None
    _began: dict[str, Any] = field(default_factory=dict)  # the code and variables with which the program began
    _told: list[Any] = field(default_factory=list)  # what its host calls gave: a value, or an exception's type and text

    async def run(self, code: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
        assert self._running is None, "a program while another runs"
        self.values.update(inputs)
        return self._begin(code)

    def _begin(self, code: str) -> HostCall | Ended:
        self._began, self._told = {"code": code, "values": json.loads(json.dumps(self.values))}, []
        if code not in self.runtime.programs:
            return Ended(error=ProgramError("SyntaxError", f"no program {code!r}", 1, "Write another."))
        self._running = self.runtime.programs[code](self.values, self._output.append)
        return self._go(lambda program: next(program))

    async def answer(self, value: Any) -> HostCall | Ended:
        return self._answer({"value": value})

    async def refuse(self, type: str, message: str) -> HostCall | Ended:
        return self._answer({"type": type, "message": message})

    def _answer(self, told: dict[str, Any]) -> HostCall | Ended:
        self._told.append(told)
        if "value" in told:
            return self._go(lambda program: program.send(told["value"]))
        error = getattr(builtins, told["type"])(told["message"])
        return self._go(lambda program: program.throw(error))

    def _go(self, step: Callable[[Generator[HostCall, Any, Any]], HostCall]) -> HostCall | Ended:
        assert self._running is not None, "an answer to no program"
        assert not self.closed, "a worker that was ended"
        try:
            return step(self._running)
        except StopIteration as end:
            self._running = None
            return Ended(end.value)
        except Spoil as error:
            self._running = None
            self.values.clear()
            return Ended(error=ProgramError("TimeoutError", str(error), None, ""), spoiled=True)
        except BaseException as error:
            self._running = None
            return Ended(error=ProgramError(type(error).__name__, str(error), 1, ""))

    async def dump(self) -> bytes:
        assert not self.closed, "a worker that was ended"
        if self._running is None:
            return json.dumps({"values": self.values}).encode()
        return json.dumps(self._began | {"told": self._told}).encode()

    async def load(self, dump: bytes) -> HostCall | None:
        self.loaded.append(dump)
        made = json.loads(dump)
        self.values, self._running = made["values"], None
        if "code" not in made:
            return None
        step = self._begin(made["code"])
        for told in made["told"]:
            step = self._answer(told)
        assert isinstance(step, HostCall), "a dumped program that ended"
        return step

    async def variables(self) -> dict[str, str]:
        assert self._running is None, "variables of a program that runs"
        return {name: type(value).__name__ for name, value in self.values.items()}

    def take_output(self) -> str:
        output, self._output = "".join(f"{line}\n" for line in self._output), []
        return output

    async def close(self) -> None:
        self.closed = True


@dataclass
class FakeRuntime:
    """Starts workers of these programs, by the code that runs each."""

    programs: dict[str, Program] = field(default_factory=dict)
    isolation: str = "none: a fake"
    version: str = "fake 1"
    workers: list[FakeWorker] = field(default_factory=list)
    closed: bool = False

    async def opened(self) -> FakeRuntime:
        """Itself, as it is asked for."""
        return self

    @property
    def live(self) -> list[FakeWorker]:
        """The workers that were not ended."""
        return [worker for worker in self.workers if not worker.closed]

    async def start(self, limits: Limits, functions: Collection[str]) -> Worker:
        self.workers.append(FakeWorker(self, limits, functions))
        return self.workers[-1]

    async def close(self) -> None:
        self.closed = True
        for worker in self.live:
            await worker.close()
