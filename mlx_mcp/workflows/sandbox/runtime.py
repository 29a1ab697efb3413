"""The port to what runs a sandbox's programs. Knows nothing of models, callers or files.

A `Runtime` starts workers. A `Worker` is one interpreter with its variables. It runs one program at a time, and stops
at each call of a host function until it is told what that gives:

    run(code) ─► HostCall ─ answer(value) or refuse(type, message) ─► HostCall ─ … ─► Ended
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Limits:
    """What the programs of one worker may use."""

    seconds: float = 10.0  # of the interpreter's time in one run; the time of host calls is not counted
    memory_bytes: int = 256 * 1024 * 1024
    output_chars: int = 1_000_000  # printed in one run; a run that prints more is ended, and its variables stay


@dataclass(frozen=True)
class HostCall:
    """A call of a host function. The program waits for `Worker.answer` or `Worker.refuse`."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgramError:
    """The exception with which a program ended, as its author is told of it."""

    type: str
    message: str
    line: int | None  # in the code as it was sent; None where no line is known
    hint: str  # what to write instead; empty where nothing is known


@dataclass(frozen=True)
class Ended:
    """A program has ended: at its last line, at an exception, or at SystemExit, which is no error."""

    value: Any = None  # of its last expression; a text of it where JSON has no such value
    error: ProgramError | None = None
    # A limit of time or memory was reached, or the worker's process ended. The variables must not be used again: load
    # the last dump.
    spoiled: bool = False


class Worker(Protocol):
    """One interpreter and its variables. What crosses is None, bool, int, float, str, list, dict or tuple."""

    async def run(self, code: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
        """Begin a program.

        `inputs` become variables, which stay. `moment`, in seconds since the epoch, is what its clock shows from the
        beginning to the end, and the seed of random numbers that the program does not seed; now, if it is left out. The
        same program with the same variables, answers and moment does the same again.
        """

    async def answer(self, value: Any) -> HostCall | Ended:
        """Give the program the value of its host call, and go on."""

    async def refuse(self, type: str, message: str) -> HostCall | Ended:
        """Raise an exception of a built-in type in place of the host call's value, and go on."""

    async def dump(self) -> bytes:
        """All state between two runs. Valid for one `Runtime.version`.

        pydantic-monty also gives that of a program that waits in a host call.

        Raises:
            SandboxFailed: the worker has ended, or a program waits and this interpreter cannot be kept meanwhile.
        """

    async def load(self, dump: bytes) -> HostCall | None:
        """Put a dump in place of all state. Returns the host call in which the dumped program waits, if it does.

        A worker that has ended, or whose state is spoiled, is as new afterwards.

        Raises:
            SandboxFailed: it is no dump of this `Runtime.version`, or the worker does not start.
        """

    async def variables(self) -> dict[str, str]:
        """The variables by name: type, and size or a preview, in a line. Between two runs alone."""

    def take_output(self) -> str:
        """What was printed since the last call."""

    async def close(self) -> None:
        """End the worker, whatever it is doing. A task that waits for it gets `Ended`, spoiled."""


class Runtime(Protocol):
    """Starts workers, each of them a process of its own."""

    isolation: str  # what is around the interpreter: "bubblewrap", "seatbelt", "interpreter only"; and if it is CPython
    version: str  # dumps are valid within one

    async def start(self, limits: Limits, functions: Collection[str]) -> Worker:
        """Start a worker without variables. `functions` are the names of the host functions that its programs have.

        Raises:
            SandboxFailed: the worker does not start.
        """

    async def close(self) -> None:
        """End all workers."""
