"""One process of the interpreter, driven step by step.

It stops where a program calls a function that it has not defined, and that call is the port's `HostCall`. It also stops
for the clock and for random numbers, which are answered here: both depend on nothing but the run's moment.

The process is killed when a turn takes longer than its limit, when a limit of the program's has been reached, when the
task that waits for it is cancelled, and at `close`. `load` starts another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox import dumps, prelude
from mlx_mcp.workflows.sandbox.classes import NotRun
from mlx_mcp.workflows.sandbox.explaining import ASKED, ENDED, explain, limit_reached, raisable, spoiled, too_slow
from mlx_mcp.workflows.sandbox.idioms import Idioms
from mlx_mcp.workflows.sandbox.isolation import Enclosed
from mlx_mcp.workflows.sandbox.monty_process import TURN_GRACE_S, MontyProcess, foreign_errors
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits
from mlx_mcp.workflows.sandbox.values import TooLarge, plain, sendable

if TYPE_CHECKING:
    from pydantic_monty import CollectString, Frame, FunctionSnapshot, MontyError, MontySession
    from pydantic_monty import SyncSnapshot as Step

MAX_ASKED = 10_000  # looks at the clock, and at names and files that are not there, in one run
TOO_LARGE_COUNTS = MAX_ASKED // 5  # as that many looks: what is too large has been read to be known as such
MAX_ENTROPY_BYTES = 1 << 20


class MontyWorker:
    """One process of the interpreter, and the state of what it runs."""

    def __init__(
        self,
        enclosed: Enclosed,
        version: str,
        limits: Limits,
        functions: Collection[str],
        on_close: Callable[[MontyWorker], None],
    ) -> None:
        """`on_close` is called with the worker when it is closed."""
        self._enclosed, self._version, self._limits, self._on_close = enclosed, version, limits, on_close
        self._functions = frozenset(functions)
        self._process: MontyProcess | None = None
        self._waiting: FunctionSnapshot | None = None
        self._idioms = Idioms(self._functions)
        self._defined: set[str] = set()  # names of the prelude
        self._code = ""
        self._moment = 0.0
        self._num_asked = 0
        self._output: CollectString | None = None
        self._num_kept = 0  # characters of `_output` that are in `_printed`, or were taken
        self._printed = ""

    async def begin(self) -> None:
        """Start the process.

        Raises:
            SandboxFailed: it does not start.
        """
        self._process = MontyProcess(self._enclosed, self._limits)
        try:
            await self._process.start()
        except BaseException:
            self._process = None
            raise

    async def run(self, code: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
        """See `Worker.run`."""
        assert self._waiting is None, "a program is still waiting for its host call"
        self._moment = time.time() if moment is None else moment
        self._code, self._num_asked = code, 0
        try:
            rewritten = await asyncio.to_thread(self._idioms.rewrite, code)
        except NotRun as exc:
            return Ended(error=exc.error)
        ended = await self._define(rewritten.used)
        if ended is not None and ended.error is not None:
            return ended
        step = await self._feed(rewritten.code, inputs)
        if rewritten.doubt and isinstance(step, Ended) and step.error is not None and step.error.type == "SyntaxError":
            return Ended(error=rewritten.doubt)
        return step

    async def answer(self, value: Any) -> HostCall | Ended:
        """See `Worker.answer`."""
        return await self._resume({"return_value": sendable(value)})

    async def refuse(self, type: str, message: str) -> HostCall | Ended:
        """See `Worker.refuse`."""
        type, message = raisable(type, message)
        return await self._resume({"exc_type": type, "message": message})

    async def dump(self) -> bytes:
        """See `Worker.dump`."""
        if self._process is None:
            raise SandboxFailed(ENDED)
        head = {"version": self._version, "waiting": self._waiting is not None, "idioms": self._idioms.state()}
        head |= {"moment": self._moment, "num_asked": self._num_asked, "code": self._code}
        head["defined"] = sorted(self._defined)
        waiting = self._waiting
        try:
            state = await self._process.do(lambda session: session.dump() if waiting is None else waiting.dump())
        except foreign_errors() as exc:
            await self._end()
            raise SandboxFailed(ENDED) from exc
        return dumps.made(head, state)

    async def load(self, dump: bytes) -> HostCall | None:
        """See `Worker.load`."""
        found, state = dumps.opened(dump, self._version)
        await self._end()
        await self.begin()
        assert self._process is not None
        self._moment, self._num_asked, self._code = found["moment"], found["num_asked"], found["code"]
        self._idioms, self._defined = Idioms(self._functions, found["idioms"]), set(found.get("defined", ()))
        try:
            if not found["waiting"]:
                await self._process.do(lambda session: session.load_session(state))
                return None
            self._idioms.rewrite(self._code)  # for the lines of errors that are still to come
            output = self._new_output()
            call = await self._process.do(
                lambda session: self._advance(session.load_snapshot(state, print_callback=output))
            )
        except foreign_errors() as exc:
            await self._end()
            raise SandboxFailed(dumps.DAMAGED) from exc
        assert isinstance(call, HostCall), "a program that waits for a call waits again"
        return call

    async def variables(self) -> dict[str, str]:
        """See `Worker.variables`."""
        assert self._waiting is None, "the variables of a program that waits are not looked at"
        if self._process is None:
            return {}
        self._keep_output()
        await self._define(["_described"])
        ended = await self._feed(prelude.DESCRIBE, {"_helpers": sorted(prelude.HELPERS)})
        self._output = None  # a program may have put something that prints in place of what this needs, such as `len`
        if not isinstance(ended, Ended) or not isinstance(ended.value, dict):
            return {}
        return {str(name): str(line) for name, line in ended.value.items()}

    def take_output(self) -> str:
        """See `Worker.take_output`."""
        self._keep_output()
        text, self._printed = self._printed, ""
        return text

    async def close(self) -> None:
        """See `Worker.close`."""
        await self._end()
        self._on_close(self)

    # -- one turn of the interpreter --

    async def _define(self, wanted: Collection[str]) -> Ended | None:
        """Define names of the prelude, each once: the interpreter keeps the source of all that it ever got."""
        names = [name for name in prelude.needed(wanted) if name not in self._defined]
        if not names:
            return None
        ended = await self._feed(prelude.source_of(names), {})
        assert isinstance(ended, Ended), "definitions call no host"
        if ended.error is None:
            self._defined.update(names)
        return ended

    async def _feed(self, code: str, inputs: Mapping[str, Any]) -> HostCall | Ended:
        output, given = self._new_output(), sendable(dict(inputs))
        return await self._turn(lambda session: session.feed_start(code, inputs=given, print_callback=output))

    async def _resume(self, answer: Any) -> HostCall | Ended:
        waiting, self._waiting = self._waiting, None
        assert waiting is not None, "no program waits for an answer"
        return await self._turn(lambda _: waiting.resume(answer))

    async def _turn(self, begin: Callable[[MontySession], Step]) -> HostCall | Ended:
        """Take the program to its next host call or its end, and say how it ended."""
        from pydantic_monty import MontyCrashedError, MontyError

        if self._process is None:
            return spoiled(ENDED)
        try:
            step = await self._process.do(lambda session: self._advance(begin(session)))
        except MontyCrashedError as exc:
            step = too_slow(self._limits) if exc.timed_out else spoiled(ENDED)
        except MontyError as exc:
            step = self._failed(exc)
        except RuntimeError:  # the library's word for a process that is gone
            step = spoiled(ENDED)
        except BaseException:
            await self._end()
            raise
        if isinstance(step, Ended) and step.spoiled:
            await self._end()
        return step

    # -- on the thread of the process --

    def _advance(self, step: Step) -> HostCall | Ended:
        """Answer what the interpreter asks, up to a host call or the end."""
        from pydantic_monty import FunctionSnapshot, MontyComplete, NameLookupSnapshot

        deadline = time.monotonic() + self._limits.seconds + TURN_GRACE_S  # of what is asked here; it costs little time
        while True:
            if isinstance(step, MontyComplete):
                return Ended(value=_value(step.output))
            if isinstance(step, FunctionSnapshot) and step.function_name in self._functions:
                try:
                    call = HostCall(step.function_name, *_arguments(step))
                except TooLarge as exc:
                    self._num_asked += TOO_LARGE_COUNTS
                    if self._num_asked > MAX_ASKED:
                        return spoiled(ASKED)
                    step = step.resume({"exc_type": "ValueError", "message": f"{step.function_name}(): {exc}"})
                    continue
                self._waiting = step
                return call
            self._num_asked += 1
            if self._num_asked > MAX_ASKED:
                return spoiled(ASKED)
            if time.monotonic() > deadline:
                return too_slow(self._limits)
            if isinstance(step, FunctionSnapshot):
                step = _asked(step, self._moment, self._num_asked)
            elif isinstance(step, NameLookupSnapshot) and step.variable_name in self._functions:
                step = step.resume(value=_function(step.variable_name))
            elif isinstance(step, NameLookupSnapshot):
                step = step.resume()
            else:
                return spoiled(ENDED)

    # -- what becomes of it --

    def _failed(self, exc: MontyError) -> Ended:
        """How a program ended by an exception of the interpreter."""
        inner = exc.exception()
        if isinstance(inner, SystemExit):
            return Ended()
        message = str(exc)
        if limit := limit_reached(inner, message, self._limits):
            return limit
        name, separator, rest = message.partition(": ")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or name.rpartition(".")[2] != type(inner).__name__:
            name, rest = type(inner).__name__, message if separator or message != name else ""
        return Ended(error=explain(name.rpartition(".")[2], rest, self._line(exc)))

    def _line(self, exc: MontyError) -> int | None:
        """The line of the code that was sent in which the exception was raised, or what raised it was called."""
        frames: list[Frame] = getattr(exc, "traceback", list)()
        own = [frame for frame in frames if frame.filename == frames[0].filename]
        return self._idioms.line(own[-1].line, own[-1].column) if own else None

    def _keep_output(self) -> None:
        """Move what was printed to `_printed`, except what has been moved."""
        printed = self._output.output if self._output is not None else ""
        self._printed += printed[self._num_kept :]
        self._num_kept = len(printed)

    def _new_output(self) -> CollectString:
        from pydantic_monty import CollectString

        self._keep_output()
        self._output, self._num_kept = CollectString(max_bytes=self._limits.output_chars), 0
        return self._output

    async def _end(self) -> None:
        """End the process, whatever it does. `load` starts another one."""
        process, self._process, self._waiting = self._process, None, None
        if process is not None:
            await process.end()
        self._keep_output()
        self._output, self._num_kept = None, 0


def _asked(call: FunctionSnapshot, start: float, number: int) -> Step:
    """Answer the clock and the source of random numbers; files and unknown functions are not there."""
    moment = start + number / 1000  # so that time passes, and always the same
    match call.function_name:
        case "time.time":
            return call.resume({"return_value": moment})
        case "datetime.now":
            zone = call.args[0] if call.args else None
            now = datetime.fromtimestamp(moment, zone or UTC)
            return call.resume({"return_value": now if zone else now.replace(tzinfo=None)})
        case "date.today":
            return call.resume({"return_value": datetime.fromtimestamp(moment, UTC).date()})
        case "os.urandom" if isinstance(size := call.args[0], int) and 0 <= size <= MAX_ENTROPY_BYTES:
            seed = hashlib.shake_256(f"{start!r} {number}".encode())
            return call.resume({"return_value": seed.digest(size)})
        case name if call.is_os_function:
            return call.resume_not_handled()
        case name:
            return call.resume({"exc_type": "NameError", "message": f"name '{name}' is not defined"})


def _value(value: Any) -> Any:
    """What a program's last expression gives; a text of it where it is larger than a result may be."""
    try:
        return plain(value)
    except TooLarge as exc:
        return f"<{type(value).__name__}: {exc}>"


def _arguments(step: FunctionSnapshot) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(plain, step.args)), {name: plain(each) for name, each in step.kwargs.items()}


def _function(name: str) -> Callable[..., None]:
    """A function of that name, which stands for a host function where a program passes it on."""

    def function(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("host functions are called step by step")

    function.__name__ = name
    return function
