"""Runs a sandbox's programs in pydantic-monty, an interpreter of Python that is a process of its own.

This drives the interpreter step by step: it stops where a program calls a function that it has not defined, and that
call is the port's `HostCall`. It also stops for the clock and for random numbers, which are answered here.

A worker's process is killed when a turn takes longer than its limit, when the task that waits for it is cancelled, and
at `close`. `load` starts another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox.classes import NotRun
from mlx_mcp.workflows.sandbox.explaining import explain
from mlx_mcp.workflows.sandbox.idioms import Idioms
from mlx_mcp.workflows.sandbox.isolation import enclose
from mlx_mcp.workflows.sandbox.prelude import DESCRIBE, HELPERS
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits, ProgramError, Worker
from mlx_mcp.workflows.sandbox.values import TooLarge, plain, sendable

if TYPE_CHECKING:
    from pydantic_monty import AsyncFunctionSnapshot, AsyncMonty, AsyncMontySession, CollectString, Frame, MontyError

DUMP_FORMAT = 1
# Beyond the time that a program may take: for the interpreter to notice it, and to send and receive what crosses.
TURN_GRACE_S = 30.0
# Each suspension is a call of the host: its caller bounds those of its own functions, MAX_ASKED bounds the others.
MAX_SUSPENSIONS = 1_000_000_000
MAX_ASKED = 20_000  # looks at the clock, and at names and files that are not there, in one run
MAX_RECURSION = 500
MAX_ENTROPY_BYTES = 1 << 20
ENDED = "the sandbox's process has ended. Its variables are those of its last state that was kept"
ASKED = (
    f"the program looked more than {MAX_ASKED} times at the clock, or at files and names that are not there. Its "
    "variables are those of before"
)
SLOW = "Do less in one run: search with `re` before you loop, take a part of the input, or go on in a next run."
LARGE = "Keep less at once: go through the text in chunks, and do not copy it."
LOUD = "Print less: counts, or the first few. What is large belongs in a variable."
EXCEPTION_TYPES = frozenset(
    "SystemExit TimeoutError RuntimeError ValueError TypeError KeyError OSError PermissionError FileNotFoundError "
    "MemoryError NameError NotImplementedError Exception".split()
)


async def open_runtime() -> MontyRuntime:
    """Find the interpreter, and try out what can be put around it.

    Raises:
        SandboxFailed: it is not installed, or does not run here.
    """
    try:
        import pydantic_monty
        from pydantic_monty._binary import find_monty_binary

        interpreter = Path(find_monty_binary())
    except (ImportError, FileNotFoundError) as exc:
        raise SandboxFailed(
            "Sandboxes need the package pydantic-monty, which is not installed whole. Run: "
            "pip install --force-reinstall 'pydantic-monty>=1.4,<2', and start the server again."
        ) from exc
    folder = Path(tempfile.mkdtemp(prefix="mlx-mcp-sandbox-"))
    try:
        isolation, script = await asyncio.to_thread(enclose, interpreter, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return MontyRuntime(isolation, script, pydantic_monty.__version__)


class MontyRuntime:
    """Starts workers by one script, which encloses the interpreter. `open_runtime` makes it."""

    def __init__(self, isolation: str, script: Path, interpreter_version: str) -> None:
        self.isolation = isolation
        self.version = f"monty {interpreter_version}, {DUMP_FORMAT}"
        self._script = script
        self._workers: set[MontyWorker] = set()

    async def start(self, limits: Limits, functions: Collection[str]) -> Worker:
        """See `Runtime.start`."""
        worker = MontyWorker(self._script, self.version, limits, functions, self._workers.discard)
        await worker.begin()
        self._workers.add(worker)
        return worker

    async def close(self) -> None:
        """See `Runtime.close`."""
        for worker in list(self._workers):
            await worker.close()
        shutil.rmtree(self._script.parent, ignore_errors=True)


class MontyWorker:
    """One process of the interpreter, and the state of what it runs."""

    def __init__(
        self,
        script: Path,
        version: str,
        limits: Limits,
        functions: Collection[str],
        on_close: Callable[[MontyWorker], None],
    ) -> None:
        self._script, self._version, self._limits, self._on_close = script, version, limits, on_close
        self._functions = frozenset(functions)
        self._pool: AsyncMonty | None = None
        self._session: AsyncMontySession | None = None
        self._pid: int | None = None
        self._waiting: AsyncFunctionSnapshot | None = None
        self._idioms = Idioms(self._functions)
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
        import pydantic_monty

        seconds = self._limits.seconds
        self._pool = pydantic_monty.AsyncMonty(
            binary_path=self._script,
            min_processes=0,
            max_processes=1,
            max_checkouts_per_worker=1,
            request_timeout=seconds + TURN_GRACE_S,
            feed_duration_limit_grace=TURN_GRACE_S / 2,
        )
        try:
            await self._pool.__aenter__()
            self._session = self._pool.checkout(
                limits={
                    "max_feed_duration_secs": seconds,
                    "max_memory": self._limits.memory_bytes,
                    "max_suspensions": MAX_SUSPENSIONS,
                    "max_recursion_depth": MAX_RECURSION,
                },
                os_policy={"datetime": "call_host", "random_start": "call_host", "sleep": "zero"},
                # A failed `assert` says what it was written with, as in Python, and quotes no values.
                assert_message_annotations=False,
            )
            await self._session.__aenter__()
        except (pydantic_monty.MontyError, OSError, RuntimeError) as exc:
            await self._end()
            raise SandboxFailed(
                f"The sandbox's interpreter does not start ({type(exc).__name__}). Try again; `mlx-mcp doctor` says "
                "what is wrong if it goes on."
            ) from exc
        self._pid = self._session.worker_pid

    async def run(self, code: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
        """See `Worker.run`."""
        assert self._waiting is None, "a program is still waiting for its host call"
        self._moment = time.time() if moment is None else moment
        self._num_asked, self._code = 0, code
        try:
            rewritten = await asyncio.to_thread(self._idioms.rewrite, code)
        except NotRun as exc:
            return Ended(error=exc.error)
        if rewritten.prelude:
            ended = await self._turn(lambda: self._feed(rewritten.prelude, {}))
            if isinstance(ended, Ended) and ended.error is not None:
                return ended
        return await self._turn(lambda: self._feed(rewritten.code, inputs))

    async def answer(self, value: Any) -> HostCall | Ended:
        """See `Worker.answer`."""
        return await self._resume({"return_value": sendable(value)})

    async def refuse(self, type: str, message: str) -> HostCall | Ended:
        """See `Worker.refuse`."""
        if type not in EXCEPTION_TYPES:
            type, message = "RuntimeError", f"{type}: {message}"
        return await self._resume({"exc_type": type, "message": message})

    async def dump(self) -> bytes:
        """See `Worker.dump`."""
        if self._session is None:
            raise SandboxFailed(ENDED)
        head = {"version": self._version, "waiting": self._waiting is not None, "idioms": self._idioms.state()}
        head |= {"moment": self._moment, "num_asked": self._num_asked, "code": self._code}
        try:
            if self._waiting is not None:
                state = await asyncio.to_thread(self._waiting.dump)
            else:
                state = await self._session.dump()
        except BaseException as exc:
            await self._end()
            if isinstance(exc, _foreign_errors()):
                raise SandboxFailed(ENDED) from exc
            raise
        return json.dumps(head).encode() + b"\n" + state

    async def load(self, dump: bytes) -> HostCall | None:
        """See `Worker.load`."""
        head, _, state = dump.partition(b"\n")
        try:
            found = json.loads(head)
            version = str(found["version"])
        except (ValueError, KeyError, TypeError) as exc:
            raise SandboxFailed("This is no state of a sandbox. Begin a new sandbox.") from exc
        if version != self._version:
            raise SandboxFailed(
                f"This state was kept by {version[:80]!r}, and this is {self._version!r}. Run its programs again."
            )
        await self._end()
        await self.begin()
        assert self._session is not None
        self._moment, self._num_asked, self._code = found["moment"], found["num_asked"], found["code"]
        self._idioms = Idioms(self._functions, found["idioms"])
        try:
            if not found["waiting"]:
                await self._session.load_session(state)
                return None
            self._new_output()
            call = await self._advance(await self._session.load_snapshot(state, print_callback=self._output))
        except BaseException as exc:
            await self._end()
            if isinstance(exc, _foreign_errors()):
                raise SandboxFailed("The state of this sandbox is damaged. Begin a new sandbox.") from exc
            raise
        assert isinstance(call, HostCall), "a program that waits for a call waits again"
        return call

    async def variables(self) -> dict[str, str]:
        """See `Worker.variables`."""
        assert self._waiting is None, "the variables of a program that waits are not looked at"
        if self._session is None:
            return {}
        try:
            found = plain(await self._session.feed_run(DESCRIBE, inputs={"_helpers": sorted(HELPERS)}))
        except _foreign_errors():
            return {}  # the program has put something else in place of what this needs, such as `len`
        except BaseException:
            await self._end()
            raise
        return {str(name): str(line) for name, line in found.items()}

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

    async def _feed(self, code: str, inputs: Mapping[str, Any]) -> Any:
        assert self._session is not None
        self._new_output()
        return await self._session.feed_start(code, inputs=sendable(dict(inputs)), print_callback=self._output)

    async def _resume(self, answer: Any) -> HostCall | Ended:
        waiting, self._waiting = self._waiting, None
        assert waiting is not None, "no program waits for an answer"
        return await self._turn(lambda: waiting.resume(answer))

    async def _turn(self, begin: Callable[[], Awaitable[Any]]) -> HostCall | Ended:
        """Take the program to its next host call or its end, and say how it ended."""
        from pydantic_monty import MontyCrashedError, MontyError

        if self._session is None:
            return _spoiled("RuntimeError", ENDED)
        try:
            return await self._advance(await begin())
        except MontyCrashedError as exc:
            await self._end()
            return (
                _spoiled("TimeoutError", "the program ran too long", SLOW)
                if exc.timed_out
                else _spoiled("RuntimeError", ENDED)
            )
        except MontyError as exc:
            return await self._failed(exc)
        except BaseException as exc:
            # Also where the task is cancelled: what the program was doing is unknown.
            await self._end()
            if isinstance(exc, RuntimeError):
                return _spoiled("RuntimeError", ENDED)
            raise

    async def _advance(self, step: Any) -> HostCall | Ended:
        """Answer what the interpreter asks, up to a host call or the end."""
        from pydantic_monty import AsyncFunctionSnapshot, AsyncNameLookupSnapshot, MontyComplete

        while True:
            if isinstance(step, MontyComplete):
                return Ended(value=_value(step.output))
            self._num_asked += 1
            if isinstance(step, AsyncFunctionSnapshot) and step.function_name in self._functions:
                self._num_asked -= 1
                try:
                    args = tuple(plain(each) for each in step.args)
                    kwargs = {name: plain(each) for name, each in step.kwargs.items()}
                except TooLarge as exc:
                    step = await step.resume({"exc_type": "ValueError", "message": f"{step.function_name}(): {exc}"})
                    continue
                self._waiting = step
                return HostCall(step.function_name, args, kwargs)
            if self._num_asked > MAX_ASKED:
                await self._end()
                return _spoiled("RuntimeError", ASKED)
            if isinstance(step, AsyncFunctionSnapshot):
                step = await self._ask(step)
            elif isinstance(step, AsyncNameLookupSnapshot) and step.variable_name in self._functions:
                step = await step.resume(value=_function(step.variable_name))
            elif isinstance(step, AsyncNameLookupSnapshot):
                step = await step.resume()
            else:
                await self._end()
                return _spoiled("RuntimeError", ENDED)

    async def _ask(self, call: AsyncFunctionSnapshot) -> Any:
        """Answer the clock and the source of random numbers; files and unknown functions are not there."""
        moment = self._moment + self._num_asked / 1000  # so that time passes, and always the same
        match call.function_name:
            case "time.time":
                return await call.resume({"return_value": moment})
            case "datetime.now":
                zone = call.args[0] if call.args else None
                now = datetime.fromtimestamp(moment, zone or UTC)
                return await call.resume({"return_value": now if zone else now.replace(tzinfo=None)})
            case "date.today":
                return await call.resume({"return_value": datetime.fromtimestamp(moment, UTC).date()})
            case "os.urandom" if call.args[0] <= MAX_ENTROPY_BYTES:
                seed = hashlib.shake_256(f"{self._moment!r} {self._num_asked}".encode())
                return await call.resume({"return_value": seed.digest(call.args[0])})
            case name if call.is_os_function:
                return await call.resume_not_handled()
            case name:
                return await call.resume({"exc_type": "NameError", "message": f"name '{name}' is not defined"})

    async def _failed(self, exc: MontyError) -> Ended:
        """How a program ended by an exception of the interpreter."""
        inner = exc.exception()
        if isinstance(inner, SystemExit):
            return Ended()
        message = str(exc)
        if limit := _limit(inner, message, self._limits):
            if limit.spoiled:
                await self._end()
            return limit
        name, separator, rest = message.partition(": ")
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or name.rpartition(".")[2] != type(inner).__name__:
            name, rest = type(inner).__name__, message if separator or message != name else ""
        return Ended(error=explain(name.rpartition(".")[2], rest, self._line(exc), self._code))

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

    def _new_output(self) -> None:
        from pydantic_monty import CollectString

        self._keep_output()
        self._output, self._num_kept = CollectString(max_bytes=self._limits.output_chars), 0

    async def _end(self) -> None:
        """End the process, whatever it does. `load` starts another one."""
        pool, session, pid = self._pool, self._session, self._pid
        self._pool = self._session = self._pid = self._waiting = None
        self._keep_output()
        self._output, self._num_kept = None, 0
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(*_foreign_errors()):
            if session is not None:
                await session.__aexit__(None, None, None)
        with contextlib.suppress(*_foreign_errors()):
            if pool is not None:
                await pool.__aexit__(None, None, None)


def _value(value: Any) -> Any:
    """What a program's last expression gives; a text of it where it is larger than a result may be."""
    try:
        return plain(value)
    except TooLarge as exc:
        return f"<{type(value).__name__}: {exc}>"


def _function(name: str) -> Callable[..., None]:
    """A function of that name, which stands for a host function where a program passes it on."""

    def function(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("host functions are called step by step")

    function.__name__ = name
    return function


def _limit(inner: BaseException, message: str, limits: Limits) -> Ended | None:
    """How a program ended that reached a limit, if it did. A program that says the same is taken at its word."""
    if isinstance(inner, TimeoutError) and "feed time limit exceeded" in message:
        return _spoiled("TimeoutError", f"the program ran for more than {limits.seconds:g} s", SLOW)
    if isinstance(inner, MemoryError) and f"> {limits.output_chars} bytes" in message:
        text = f"the program printed more than {limits.output_chars} characters"
        return Ended(error=ProgramError("MemoryError", text, None, LOUD))
    if isinstance(inner, MemoryError):
        text = f"the program needed more than {limits.memory_bytes >> 20} MiB"
        return _spoiled("MemoryError", text, LARGE)
    return None


def _spoiled(type_name: str, message: str, hint: str = "") -> Ended:
    return Ended(error=ProgramError(type_name, message, None, hint), spoiled=True)


def _foreign_errors() -> tuple[type[Exception], ...]:
    """What the interpreter's library raises where its process is gone or what it was given makes no sense."""
    from pydantic_monty import MontyError

    return (MontyError, RuntimeError, OSError, ValueError, TypeError)
