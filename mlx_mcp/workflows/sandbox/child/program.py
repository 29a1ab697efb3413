"""Runs one program after the other in one set of variables: output, host functions, clock, value, exception."""

from __future__ import annotations

import ast
import builtins
import io
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

from mlx_mcp.workflows.sandbox.child.variables import new_namespace, settle
from mlx_mcp.workflows.sandbox.inside import helpers
from mlx_mcp.workflows.sandbox.values import TooLarge, plain

Called = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]

KEPT_CHARS, KEPT_S = 8192, 0.1  # output is sent when there is so much of it, or a line so long after the last
_HELPERS = ("chunks", "grep", "lines")


class TooMuchOutput(BaseException):
    """The program has printed more than it may. No `except Exception` of the program's catches it."""


@dataclass(frozen=True)
class End:
    """How a program ended."""

    value: Any = None  # plain
    error: dict[str, Any] | None = None  # type, message, line
    limit: str = ""  # "output" or "memory": which one was reached


class HostFunction:
    """A function of the host, as a program has it: a call waits for the host's answer."""

    def __init__(self, name: str, called: Called) -> None:
        self.__name__ = name
        self._called = called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the host."""
        return self._called(self.__name__, args, kwargs)

    def __repr__(self) -> str:
        return f"<function {self.__name__}>"

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _host_function, (self.__name__,)


def _host_function(name: str) -> Any:
    return getattr(builtins, name)


class Output(io.TextIOBase):
    """What programs print: sent in pieces, and ended where it becomes too much."""

    def __init__(self, send: Callable[[str], None], max_chars: int) -> None:
        self._send, self._max = send, max_chars
        self._lock = threading.RLock()
        self.begin(open=False)

    def begin(self, open: bool = True) -> None:
        """Take the output of a new program; what comes outside of one is dropped."""
        self._open, self._num, self._pieces, self._num_kept, self._sent_at = open, 0, list[str](), 0, 0.0

    def writable(self) -> bool:
        """Whether it can be written to: always."""
        return True

    def write(self, text: str) -> int:
        """Print.

        Raises:
            TooMuchOutput: the program has printed all that it may.
        """
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        with self._lock:
            if not self._open:
                return len(text)
            said = text[: self._max - self._num].encode("utf-8", "replace").decode()
            self._pieces.append(said)
            self._num += len(said)
            self._num_kept += len(said)
            is_late = said.endswith("\n") and time.monotonic() - self._sent_at > KEPT_S
            if is_late or self._num_kept >= KEPT_CHARS:
                self.flush()
            if len(said) < len(text):
                raise TooMuchOutput
        return len(text)

    def flush(self) -> None:
        """Send what has been printed since the last time."""
        with self._lock:
            said = "".join(self._pieces)
            self._pieces, self._num_kept, self._sent_at = [], 0, time.monotonic()
            if said:
                self._send(said)


@dataclass
class Clock:
    """The time of a run: it stands, but for a millisecond at each look at it. `time.sleep` returns at once."""

    moment: float = 0.0
    num_looks: int = 0

    def put_in_place(self) -> None:
        """Have programs look at this clock by the functions of `time`. `datetime` has a clock of its own."""
        vars(time).update(time=self.now, time_ns=self.now_ns, sleep=self.sleep)

    def begin(self, moment: float) -> None:
        """Begin a run, in seconds since the epoch."""
        self.moment, self.num_looks = moment, 0
        random.seed(moment)

    def now(self) -> float:
        """Seconds since the epoch."""
        self.num_looks += 1
        return self.moment + self.num_looks / 1000

    def now_ns(self) -> int:
        """Nanoseconds since the epoch."""
        return int(self.now() * 1e9)

    def sleep(self, seconds: float) -> None:
        """Return at once, and see that it is a length of time."""
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _clock, ()


def _clock() -> Any:
    """The clock of this process: a name of `time.time` that was kept looks at it."""
    return vars(time)["time"].__self__


@dataclass
class Interpreter:
    """The variables of programs, and what they find beside these."""

    called: Called
    output: Output
    scratch: Path | None  # a folder that is emptied after each run
    max_state_bytes: int  # of all variables
    namespace: dict[str, Any] = field(default_factory=new_namespace)
    clock: Clock = field(default_factory=Clock)
    num_runs: int = 0  # so that a line of one program is not taken for one of another
    state: bytes = b""  # the variables as they were at the end of the latest run
    lost: dict[str, str] = field(default_factory=dict)  # which of them that run could not leave behind
    mounted: frozenset[str] = frozenset()  # what lies in `scratch` from the beginning

    def equip(self, functions: list[str]) -> None:
        """Put functions of the host and helpers beside Python's own, and the clock and the output in place."""
        given: dict[str, Any] = {name: HostFunction(name, self.called) for name in functions}
        given |= {name: getattr(helpers, name) for name in _HELPERS}
        given |= {"show_vars": _Shown(self.variables), "open": _Opener(self.namespace)}
        vars(builtins).update(given, exit=sys.exit, quit=sys.exit)
        self.clock.put_in_place()
        self.mounted = frozenset(os.listdir(self.scratch)) if self.scratch is not None else frozenset()
        sys.stdout = sys.stderr = self.output
        self.state, _ = settle(self.namespace)

    def run(self, code: str, moment: float) -> End:
        """Run a program to its end, and settle what it leaves."""
        self.num_runs += 1
        self.clock.begin(moment)
        self.output.begin()
        try:
            end = self._ended(code)
            self.output.flush()
            self.state, self.lost = settle(self.namespace)
            if len(self.state) > self.max_state_bytes:
                end = End(limit="memory")
        except MemoryError:
            end = End(limit="memory")
        finally:
            self.output.begin(open=False)
        if self.scratch is not None:
            _empty(self.scratch, self.mounted)
        return end

    def variables(self) -> dict[str, str]:
        """The variables by name, each with a line about it."""
        shown = {name: line for name, value in list(self.namespace.items()) if (line := _described(name, value))}
        shown.update({name: f"{kind}, does not outlive its run" for name, kind in self.lost.items()})
        return shown

    def _ended(self, code: str) -> End:
        filename = f"<program {self.num_runs}>"
        try:
            body, last = _compiled(code, filename)
            exec(body, self.namespace)
            value = eval(last, self.namespace) if last is not None else None
            return End(_value(value))
        except SystemExit:
            return End()
        except MemoryError:
            raise
        except TooMuchOutput:
            return End(limit="output")
        except BaseException as error:
            return End(error={"type": type(error).__name__, "message": _text(error), "line": _line(error, filename)})


class _Shown:
    """`show_vars()`: a text with the variables that there are."""

    def __init__(self, variables: Callable[[], dict[str, str]]) -> None:
        self._variables = variables

    def __call__(self) -> str:
        return "\n".join(f"{name}: {line}" for name, line in self._variables().items())

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _host_function, ("show_vars",)


class _Opener:
    """`open()`: texts by names without a folder lie in `files`; all else is Python's own."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace, self._open = namespace, open

    def __call__(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        files = self._namespace.get("files")
        if isinstance(file, str) and isinstance(files, dict):
            if mode in ("r", "rt") and isinstance(text := files.get(file), str):
                return io.StringIO(text)
            if mode == "w" and "/" not in file:
                return _Kept(file, files)
        return self._open(file, mode, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _host_function, ("open",)


class _Kept(io.StringIO):
    """A text that is in `files` once it is closed."""

    def __init__(self, name: str, files: dict[str, Any]) -> None:
        super().__init__()
        self.name, self._files = name, files

    def close(self) -> None:
        """Keep the text."""
        if not self.closed:
            self._files[self.name] = self.getvalue()
        super().close()


def _compiled(code: str, filename: str) -> tuple[CodeType, CodeType | None]:
    """A program, and the expression at its end, if one is there."""
    tree = ast.parse(code, filename)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = compile(tree, filename, "exec", dont_inherit=True)
    if not isinstance(last, ast.Expr):
        return body, None
    return body, compile(ast.Expression(last.value), filename, "eval", dont_inherit=True)


def _value(value: Any) -> Any:
    """What the last expression gives; a text of it where it is larger than a result may be."""
    try:
        return plain(value)
    except TooLarge as error:
        return f"<{type(value).__name__}: {error}>"


def _text(error: BaseException) -> str:
    try:
        return error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # of a class of the program's
        return ""


def _line(error: BaseException, filename: str) -> int | None:
    """The line of the program at which the exception was raised, or what raised it was called."""
    if isinstance(error, SyntaxError) and error.filename == filename:
        return error.lineno
    line, traceback = None, error.__traceback__
    while traceback is not None:
        frame: FrameType = traceback.tb_frame
        if frame.f_code.co_filename == filename:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _described(name: str, value: Any) -> str:
    """What a variable is, in a line; "" where it is not shown."""
    try:
        if name.startswith("_") or isinstance(value, ModuleType):
            return ""
        if isinstance(shape := getattr(value, "shape", None), tuple) and not isinstance(value, type):
            return f"{type(value).__name__}, shape {shape}"
        line: str = helpers._preview(value)  # type: ignore[no-untyped-call]
        return line
    except Exception:  # of a class of the program's
        return type(value).__name__


def _empty(folder: Path, but: Collection[str]) -> None:
    """Remove what lies in a folder, `but` these; what cannot be removed stays."""
    with suppress(OSError):  # a program may have opened all the files that it can
        for path in folder.iterdir():
            if path.name in but:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
