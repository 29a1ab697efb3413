"""One sandbox: its state between runs, and one run of a program in it.

Guarantees:
    - A run that is cancelled, breaks a limit or loses its worker leaves the state as it was before.
    - A run whose program ends, with an exception or without, leaves the state that the program left.
    - The state of the latest run that ended is there as a value (`Sandbox.state`), whatever becomes of the worker.

Knows no owners' limits and no other sandboxes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio

from mlx_mcp.workflows.asking import close_sessions
from mlx_mcp.workflows.counting import Counts
from mlx_mcp.workflows.sandbox.host_calls import FUNCTIONS, HostCalls, HostFunction, Refused, Said, Submitted
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits, ProgramError, Runtime, Worker

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

    @property
    def busy(self) -> bool:
        """Whether a run goes on."""
        return self.running is not None

    async def load(self, runtime: Runtime, limits: Limits, more: Collection[str] = ()) -> Worker:
        """A worker with these limits and `more` functions that has the state; starts one if there is none."""
        functions = (*FUNCTIONS, *more)
        if self.worker is not None and (self.limits, self.functions) != (limits, functions):
            await self.release()
        if self.worker is None:
            worker = await runtime.start(limits, functions)
            try:
                if self.state.dump:
                    await worker.load(self.state.dump)
            except BaseException:
                await end(worker)
                raise
            self.worker, self.limits, self.functions = worker, limits, functions
        return self.worker

    async def run(self, runtime: Runtime, limits: Limits, program: Program, host: HostCalls) -> Ran:
        """Run a program to its end.

        Raises:
            EngineDead: the engine thread has ended.
        """
        before, kept = set(self.state.remembered.values()), False
        try:
            worker = await self.load(runtime, limits, program.functions)
            came = await drive(worker, program, host)
            output = worker.take_output()
            if not came.spoiled:
                variables, dump = await worker.variables(), await worker.dump()
                self.state, kept = State(dump, runtime.version, variables, host.remembered), True
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


async def drive(worker: Worker, program: Program, host: HostCalls) -> Ended:
    """Run a program, and answer its host calls."""
    step, num_refused = await worker.run(program.code, program.inputs), 0
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
            step = await worker.refuse(*told)
        else:
            step = await worker.answer(value)
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
