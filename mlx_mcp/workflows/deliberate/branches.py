"""Generations of one deliberation that run at once, each with a deadline, all with one budget.

Guarantees:
    - All share one lane: however many there are, others' calls get their turns.
    - One that is ended at its deadline, or for the budget, keeps what it has written; its session goes on from there.
    - One that had not begun by then, or is not needed any more, is cancelled, and no session is left of it.
    - When they are cancelled as a whole, their rows are free and no session is left of them before that is told.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

import anyio

from mlx_mcp.errors import Abandoned, MlxMcpError
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.batch import Outcome, run_all, run_on_forks
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.generate import run
from mlx_mcp.service.limits import AdmittedCall
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.service.several import closed_unless_whole
from mlx_mcp.service.values import Ending, GenerateRequest, Result
from mlx_mcp.workflows.counting import FAILED, Counts

T = TypeVar("T")
BEGUN = ("prefill", "decode")  # the phases of a generation that there is something of


class Status(StrEnum):
    """How a branch ended."""

    DONE = "done"
    LENGTH = "length"  # its max_tokens cut it off
    TIMED_OUT = "timed_out"  # its deadline did
    BUDGET = "budget"  # the budget of all did
    NOT_NEEDED = "not_needed"  # the vote was certain without it
    FAILED = "failed"


@dataclass(frozen=True)
class Came:
    """What came of one generation: its answer, whole or not, or why there is none."""

    status: Status
    result: Result | None
    counts: Counts
    error: MlxMcpError | None = None


@dataclass(eq=False)
class Live:
    """A generation that goes on, or has ended."""

    task: asyncio.Task[Result]
    ending: Ending
    meter: Meter
    ended: Status | None = None  # why it was ended, if it was

    def end(self, why: Status) -> None:
        """End it, unless it has ended; what it has written is kept, unless it is not needed."""
        if self.ended is not None or self.task.done():
            return
        self.ended = why
        if why is not Status.NOT_NEEDED and (self.meter.deltas or self.meter.phase in BEGUN):
            self.ending.end()
        else:
            self.task.cancel()

    async def result(self, timeout_s: float | None) -> Result:
        """What comes of it; it is ended after `timeout_s`, and when whoever waits is cancelled.

        Raises:
            Abandoned: it was cancelled, since it is not needed or had not begun by its deadline.
            MlxMcpError: it failed.
        """
        try:
            await asyncio.wait({self.task}, timeout=timeout_s)
            self.end(Status.TIMED_OUT)
            await asyncio.wait({self.task})
        finally:
            self.task.cancel()
        if self.task.cancelled():
            raise Abandoned
        return self.task.result()


@dataclass(eq=False)
class Branches:
    """Runs the generations of one deliberation. `budget_tokens` is for all that they write; None: without end."""

    service: Service
    caller: Caller
    report: Report
    budget_tokens: int | None = None
    lane: str = field(default_factory=lambda: f"deliberate-{secrets.token_hex(8)}")
    meters: list[Meter] = field(default_factory=list)  # of all generations so far
    sessions: set[str] = field(default_factory=set)  # that answers were kept in
    counts: Counts = field(default_factory=Counts)

    @property
    def left(self) -> int | None:
        """How many tokens may still be written; None: any number."""
        return None if self.budget_tokens is None else max(0, self.budget_tokens - sum(map(written, self.meters)))

    @property
    def line(self) -> str:
        """How far they are, without a word of what they say."""
        return f"{sum(meter.ended for meter in self.meters)} of {len(self.meters)} answers"

    async def run(
        self,
        requests: Sequence[GenerateRequest],
        timeouts_s: Sequence[float | None],
        reserve: int = 0,
        heard: Callable[[int, Result], bool] | None = None,
    ) -> list[Came]:
        """Run requests at once, those of a session that keep their answer on forks of it.

        All are ended when no more than `reserve` tokens are left to be written. `heard` is told of each answer that was
        not ended, with its index, and says whether the others are not needed.

        Raises:
            RateLimited: the caller may not have so many calls or sessions now.
            MlxMcpError: the session is not there; the engine has ended.
        """
        with self.service.limits.calls(self.caller.tenant, len(requests)) as admitted:
            run = Run(self, requests, timeouts_s, admitted, reserve, heard)
            self.meters += run.meters
            try:
                await together([run.some(indices) for indices in by_session(requests)])
            finally:
                tasks = [live.task for live in run.live.values()]
                with anyio.CancelScope(shield=True):
                    await asyncio.gather(*tasks, return_exceptions=True)
        came = [run.came(index) for index in range(len(requests))]
        self.counts = sum((each.counts for each in came), self.counts)
        return came

    async def close(self) -> None:
        """Close the sessions that answers were kept in: nobody will know of them."""
        there = tuple(self.sessions & known_sessions(self.service).keys())
        with anyio.CancelScope(shield=True), suppress(MlxMcpError):
            if there:
                await self.service.engine.close_sessions(self.caller.tenant, there)


class Run:
    """Requests that run at once; see Branches.run."""

    def __init__(
        self,
        branches: Branches,
        requests: Sequence[GenerateRequest],
        timeouts_s: Sequence[float | None],
        admitted: Sequence[AdmittedCall],
        reserve: int,
        heard: Callable[[int, Result], bool] | None,
    ) -> None:
        self.branches, self.requests, self.timeouts_s = branches, requests, timeouts_s
        self.admitted, self.reserve, self.heard = admitted, reserve, heard
        self.first = len(branches.meters)  # how many generations there were before
        self.meters = [Meter() for _ in requests]
        self.live: dict[int, Live] = {}
        self.outcomes: dict[int, Outcome] = {}

    async def some(self, indices: Sequence[int]) -> None:
        """Run the requests of one session, or those without one."""
        requests = [self.requests[index] for index in indices]

        async def follow(at: int, request: GenerateRequest) -> Result:
            return await self._follow(indices[at], request)

        if requests[0].session and requests[0].keep:
            outcomes = await run_on_forks(self.branches.service, requests, follow)
        else:
            outcomes = await run_all(requests, follow)
        self.outcomes.update(zip(indices, outcomes, strict=True))

    def came(self, index: int) -> Came:
        """What came of a request."""
        outcome, live = self.outcomes[index], self.live.get(index)
        ended = None if live is None else live.ended
        if isinstance(outcome, Result):
            status = ended or (Status.LENGTH if outcome.finish_reason == "length" else Status.DONE)
            return Came(status, outcome, Counts.of(outcome))
        counts = replace(FAILED, written_tokens=written(self.meters[index]))
        return Came(ended or Status.FAILED, None, counts, None if ended else outcome)

    async def _follow(self, index: int, request: GenerateRequest) -> Result:
        its, meter, ending = self.branches, self.meters[index], Ending()
        request = replace(request, lane=its.lane, ending=ending)
        whole: AbstractAsyncContextManager[None] = nullcontext()
        if request.opens is not None:  # under a name, by which it can be closed if its result is never seen
            name = f"{its.lane}-{self.first + index}"
            request = replace(request, opens=replace(request.opens, name=name))
            whole = closed_unless_whole(its.service, its.caller, name)
        async with whole:
            running = run(its.service, its.caller, request, meter, self._report, self.admitted[index])
            live = self.live[index] = Live(asyncio.create_task(running), ending, meter)
            result = await live.result(self.timeouts_s[index])
        if result.session is not None:
            its.sessions.add(result.session.session_id)
        if live.ended is None and self.heard is not None and self.heard(index, result):
            self._end_all(Status.NOT_NEEDED)
        return result

    async def _report(self) -> None:
        left = self.branches.left
        if left is not None and left <= self.reserve:
            self._end_all(Status.BUDGET)
        await self.branches.report(self.branches.meters)

    def _end_all(self, why: Status) -> None:
        for live in self.live.values():
            live.end(why)


def by_session(requests: Sequence[GenerateRequest]) -> list[list[int]]:
    """The indices of the requests of each session."""
    found: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        found.setdefault(request.session, []).append(index)
    return list(found.values())


def written(meter: Meter) -> int:
    """The tokens that a generation has written so far."""
    return meter.deltas[-1].num_tokens if meter.deltas else 0


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What comes of all; when one fails, or the caller is cancelled, the others have ended before that is told."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)
