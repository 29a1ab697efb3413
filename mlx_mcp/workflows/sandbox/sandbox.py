"""One sandbox: its state between runs, and one run of a program in it.

Guarantees:
    - A run that is cancelled, breaks a limit or loses its worker leaves the state as it was before.
    - A run whose program ends, with an exception or without, leaves the state that the program left.
    - The state of the latest run that ended is there as a value (`Sandbox.state`), whatever becomes of the worker.

Knows no owners' limits and no other sandboxes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio

from mlx_mcp.errors import OtherInterpreter, SandboxFailed
from mlx_mcp.workflows.asking import close_sessions
from mlx_mcp.workflows.counting import Counts
from mlx_mcp.workflows.sandbox.host_calls import FUNCTIONS, HostCalls, HostFunction, Refused, Said, Submitted
from mlx_mcp.workflows.sandbox.journal import CannotReplay, Journal, Recording, replay
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits, ProgramError, Runtime, Worker

T = TypeVar("T")

MAX_REFUSED = 1_000  # a program that goes on calling after so many refusals will not end by itself


@dataclass(frozen=True)
class Program:
    """What is run: code, what becomes variables before, and functions beside those that every program has."""

    code: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    functions: Mapping[str, HostFunction] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What a sandbox has between two runs. Replaced as a whole, so that forks and copies on disk share it."""

    dump: bytes = b""  # of the interpreter; empty before the first run
    version: str = ""  # of the runtime that the dump is of
    variables: Mapping[str, str] = field(default_factory=dict)  # name → what it is, in a line
    remembered: Mapping[str, str] = field(default_factory=dict)  # key → the session with the text
    journal: Journal = field(default_factory=Journal)  # how it came to this

    @property
    def nbytes(self) -> int:
        """What it takes in memory and on disk, about."""
        return len(self.dump) + self.journal.nbytes


@dataclass(eq=False)
class Kept:
    """What of a sandbox is on disk; see `keeping.py`."""

    state: State | None = None  # the one that is there; None if there is none, or none in memory
    unread: bool = False  # the state is there, and not in memory
    temporary: bool = False  # it ends with a call, and is not saved
    persisted: bool = False  # a caller asked for it
    versions: frozenset[str] = frozenset()
    saved_at: float = -math.inf  # by the event loop's clock
    saving: asyncio.Task[None] | None = None  # that will save it when its time has come


@dataclass(frozen=True)
class Ran:
    """What came of a run."""

    output: str
    ended: Ended  # its value is the submitted one, if one was
    said: Said
    counts: Counts


@dataclass(eq=False)
class Sandbox:
    """One interpreter's state, who owns it, and the worker that has it loaded, if one has."""

    sandbox_id: str
    owner: str
    name: str
    model: str  # that its programs ask; empty for the default
    used_at: float  # by the clock of `Sandboxes`
    parent: str = ""
    state: State = field(default_factory=State)
    worker: Worker | None = None
    limits: Limits = field(default_factory=Limits)  # of the worker
    functions: tuple[str, ...] = ()  # that its programs have
    running: anyio.CancelScope | None = None  # of the run that goes on
    closed: bool = False
    kept: Kept = field(default_factory=Kept)

    @property
    def busy(self) -> bool:
        """Whether a run goes on."""
        return self.running is not None

    async def load(self, runtime: Runtime, limits: Limits, more: Collection[str] = ()) -> Worker:
        """A worker with these limits and `more` functions that has the state; starts one if there is none.

        Raises:
            OtherInterpreter: the state is that of another version, and cannot be rebuilt.
            SandboxFailed: the worker does not start.
        """
        functions = (*FUNCTIONS, *more)
        if self.worker is not None and (self.limits, self.functions) != (limits, functions):
            await self.release()
        if self.worker is None:
            self.worker, self.state = await loaded(runtime, limits, self.state, functions)
            self.limits, self.functions = limits, functions
        return self.worker

    async def run(self, runtime: Runtime, limits: Limits, program: Program, host: HostCalls) -> Ran:
        """Run a program to its end.

        Raises:
            EngineDead: the engine thread has ended.
            OtherInterpreter, SandboxFailed: as for `load`.
        """
        before, kept = set(self.state.remembered.values()), False
        try:
            worker = await self.load(runtime, limits, program.functions)
            recording = Recording(program.code, program.inputs, time.time())
            came = await drive(worker, program, host, recording)
            output = worker.take_output()
            if not came.spoiled:
                variables, dump = await worker.variables(), await worker.dump()
                journal = self.state.journal.with_cell(recording.ended(output))
                self.state, kept = State(dump, runtime.version, variables, host.remembered, journal), True
        finally:
            if not kept:
                await self.release()
            unused = (before | host.opened) - set(self.state.remembered.values())
            await close_sessions(host.asker.service, self.owner, unused)
        return Ran(output, came, host.said, host.asker.counts)

    async def release(self) -> None:
        """Let go of the worker; the next run loads the state into another."""
        worker, self.worker = self.worker, None
        if worker is not None:
            await end(worker)


async def loaded(
    runtime: Runtime, limits: Limits, state: State, functions: Collection[str] = tuple(FUNCTIONS)
) -> tuple[Worker, State]:
    """A new worker that has a state, and the state as it is for this runtime, which may have had to rebuild it.

    Raises:
        OtherInterpreter: the state is that of another version, and cannot be rebuilt.
        SandboxFailed: the worker does not start, or the dump is damaged and cannot be rebuilt.
    """
    if not state.dump:
        return await runtime.start(limits, functions), state
    refused: SandboxFailed | None = None
    if state.version == runtime.version:
        try:
            worker, _ = await started(runtime, limits, functions, lambda worker: worker.load(state.dump))
            return worker, state
        except SandboxFailed as error:  # CPython cannot make every object again that it could keep
            refused = error

    async def rebuild(worker: Worker) -> bytes:
        await replay(state.journal, worker)
        return await worker.dump()

    try:
        worker, dump = await started(runtime, limits, functions, rebuild)
    except CannotReplay as why:
        raise refused or OtherInterpreter(state.version, runtime.version, str(why)) from why
    return worker, replace(state, dump=dump, version=runtime.version)


async def started(
    runtime: Runtime, limits: Limits, functions: Collection[str], fill: Callable[[Worker], Awaitable[T]]
) -> tuple[Worker, T]:
    """A new worker that something was done to, and what that gave. If that fails the worker is ended."""
    worker = await runtime.start(limits, functions)
    try:
        return worker, await fill(worker)
    except BaseException:
        await end(worker)
        raise


async def drive(worker: Worker, program: Program, host: HostCalls, recording: Recording) -> Ended:
    """Run a program, and answer its host calls."""
    step, num_refused = await worker.run(program.code, program.inputs, recording.moment), 0
    while isinstance(step, HostCall):
        try:
            if host.said.submitted:
                raise Submitted
            value = await host.answer(step)
        except (Submitted, Refused) as refused:
            num_refused += 1
            if num_refused > MAX_REFUSED:
                return Ended(error=ProgramError("RuntimeError", STUBBORN, None, ""), spoiled=True)
            told = (refused.type, refused.message) if isinstance(refused, Refused) else ("SystemExit", "")
            recording.refused(step, *told)
            step = await worker.refuse(*told)
        else:
            recording.answered(step, value)
            step = await worker.answer(value)
    recording.end = step
    if host.said.submitted and not step.spoiled:
        return Ended(host.said.value)
    return step


STUBBORN = (
    f"The program went on calling after {MAX_REFUSED} calls had been refused, and was ended. Let exceptions of host "
    "functions end the loop that they come from."
)


async def end(worker: Worker) -> None:
    """End a worker, whoever is cancelled meanwhile."""
    with anyio.CancelScope(shield=True):
        await worker.close()
