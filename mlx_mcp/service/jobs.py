"""Work that may outlast the call that asked for it, and its outcome until somebody fetches it.

A face starts a job for a call, waits for it for as long as the caller's host allows, and hands over a handle if it has
not ended by then. From that moment on the job belongs to nobody's connection: it ends by itself, by `cancel`, or with
the process. Knows no protocol: an outcome is whatever the work returned.

All of it runs on one event loop. An owner never sees another owner's jobs: a foreign handle and a missing one give the
same error.

A caller that may lose an answer gives its call a key. The work of a key is done once: a repeat of the call gets the
outcome of the first, for as long as that is kept. Work that fails has changed nothing, so its key is free again.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

from mlx_mcp.errors import GenerationFailed, InvalidRequest, UnknownResult
from mlx_mcp.service.activity import CUT_OFF, Meter, Report

RESULT_TTL_S = 3600.0
QUIET_S = 0.1
MAX_KEPT = 256  # outcomes of one owner
CANCELLED = "The call was cancelled. A turn that was cut off leaves its session as it was; call again if it is needed."

Work = Callable[[Report], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Key:
    """What a caller names a call by, to repeat it; `asked` tells whether it is the same call that is repeated."""

    text: str
    asked: str


class JobState(Enum):
    """Where a job is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Job:
    """One piece of work: its outcome when it has ended, and until then how far its generations are."""

    result_id: str
    owner: str
    tool: str
    meters: Sequence[Meter] = ()
    began_at: float = field(default_factory=time.time)
    changed_at: float = field(default_factory=time.time)
    fetched: bool = False
    outcome: Any = None
    error: BaseException | None = None
    cancelled: bool = False
    cut_off: bool = False  # by the end of the process
    key: Key | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reports: set[Report] = field(default_factory=set)  # of the calls that wait for it now
    watchers: set[asyncio.Event] = field(default_factory=set)  # set when something has come of it

    @property
    def state(self) -> JobState:
        """Where it is."""
        if not self.ended.is_set():
            return JobState.RUNNING
        if self.cancelled:
            return JobState.CANCELLED
        return JobState.DONE if self.error is None else JobState.FAILED

    def result(self) -> Any:
        """What the work returned.

        Raises:
            BaseException: what the work raised.
        """
        if self.error is not None:
            raise self.error
        return self.outcome

    async def report(self, meters: Sequence[Meter]) -> None:
        """Note how far the work is, and tell the calls that wait for it."""
        self.meters = meters
        self.note_change()
        for report in tuple(self.reports):
            try:
                await report(meters)
            except Exception:  # its caller is gone, which must not end the work for others
                self.reports.discard(report)

    def note_change(self) -> None:
        """Tell those that follow it."""
        self.changed_at = time.time()
        for watcher in self.watchers:
            watcher.set()

    async def changes(self) -> AsyncGenerator[Sequence[Meter], None]:
        """Yield how far its generations are whenever something has come of them, until it has ended."""
        watcher = asyncio.Event()
        self.watchers.add(watcher)
        try:
            while not self.ended.is_set():
                if self.meters:
                    yield self.meters
                await watcher.wait()
                watcher.clear()
        finally:
            self.watchers.remove(watcher)

    async def wait(self, timeout_s: float, report: Report | None = None) -> bool:
        """Wait for the end, and have `report` told of progress meanwhile; returns whether it has ended.

        Nothing is told of what ends within QUIET_S: a host may read of it after the result, and take that for a fault.
        """
        if report is None or timeout_s <= QUIET_S:
            return await self._ends_within(timeout_s)
        if await self._ends_within(QUIET_S):
            return True
        self.reports.add(report)
        try:
            if self.meters:
                await report(self.meters)
            return await self._ends_within(timeout_s - QUIET_S)
        finally:
            self.reports.discard(report)

    async def _ends_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ended.wait()
        return self.ended.is_set()


class Jobs:
    """The jobs of one process. `ttl_s` is how long an outcome is kept, from its end on."""

    def __init__(self, ttl_s: float = RESULT_TTL_S) -> None:
        self.ttl_s = ttl_s
        self._jobs: dict[str, Job] = {}  # by handle, once that was given out
        self._tasks: dict[Job, asyncio.Task[Any]] = {}
        self._keyed: dict[tuple[str, str], Job] = {}  # by owner and key

    @property
    def busy(self) -> bool:
        """Whether a job goes on."""
        return bool(self._tasks)

    @property
    def num_running(self) -> int:
        """Jobs that go on and whose handles were given out."""
        return sum(not job.ended.is_set() for job in self._jobs.values())

    @property
    def num_unfetched(self) -> int:
        """Outcomes that their owners have not seen."""
        return sum(job.ended.is_set() and not job.fetched for job in self._jobs.values())

    def start(self, owner: str, tool: str, work: Work) -> Job:
        """Start work on a task of its own."""
        job = Job(f"r-{secrets.token_urlsafe(16)}", owner, tool)
        task = self._tasks[job] = asyncio.create_task(work(job.report))
        task.add_done_callback(partial(self._end, job))  # a task that is cancelled at once never runs
        return job

    def once(self, owner: str, tool: str, key: Key, work: Work) -> Job:
        """The work of a key: started, unless it was before. It goes on whoever leaves, and its outcome is kept.

        Raises:
            InvalidRequest: the owner has used the key for another call.
        """
        known = self._keyed.get((owner, key.text))
        if known is not None:
            if known.key != key:
                raise InvalidRequest(
                    f"The key {key.text[:80]!r} was used for another call. Give each call a key of its own, and the "
                    "same key only to a repeat of the same call."
                )
            return known
        job = self._keyed[owner, key.text] = self.start(owner, tool, work)
        job.key = key
        self.hand_over(job)
        return job

    def _end(self, job: Job, task: asyncio.Task[Any]) -> None:
        """Take the outcome of a task that has ended."""
        del self._tasks[job]
        job.cancelled = task.cancelled() and not job.cut_off
        if task.cancelled():
            job.error = GenerationFailed(CUT_OFF if job.cut_off else CANCELLED)
        else:
            job.error = task.exception()
        if job.error is None:
            job.outcome = task.result()
        else:
            self._free_key(job)
        job.ended.set()
        job.note_change()
        if job.result_id in self._jobs:
            self._keep(job)

    def hand_over(self, job: Job) -> None:
        """Give out the handle of a job: from now on the job is known by it, and its outcome is kept."""
        if job.result_id not in self._jobs:
            self._jobs[job.result_id] = job
            if job.ended.is_set():
                self._keep(job)

    def is_known(self, job: Job) -> bool:
        """Whether its handle was given out, so that somebody may ask for its outcome."""
        return self._jobs.get(job.result_id) is job

    def _keep(self, job: Job) -> None:
        """Keep an outcome for `ttl_s`, in place of others of the owner's if there are too many."""
        asyncio.get_running_loop().call_later(self.ttl_s, self._forget, job)
        kept = [each for each in self.of(job.owner) if each.ended.is_set()]
        kept.sort(key=lambda each: (each.fetched, -each.changed_at))  # what goes first is last
        for each in kept[MAX_KEPT:]:
            self._forget(each)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.result_id, None)
        self._free_key(job)

    def _free_key(self, job: Job) -> None:
        if job.key is not None and self._keyed.get((job.owner, job.key.text)) is job:
            del self._keyed[job.owner, job.key.text]

    def drop(self, job: Job) -> None:
        """End a job, and keep nothing of it: its handle and its key are unknown from now on."""
        self.cancel(job)
        self._forget(job)

    def cancel(self, job: Job) -> None:
        """End a job; nothing is done if it has ended."""
        task = self._tasks.get(job)
        if task is not None:
            task.cancel()

    def cut_off(self) -> None:
        """End all jobs, each with an error that says that the server was stopped."""
        for job, task in self._tasks.items():
            job.cut_off = True
            task.cancel()

    def get(self, owner: str, result_id: str) -> Job:
        """The owner's job of that handle.

        Raises:
            UnknownResult: there is none, or it is another owner's.
        """
        job = self._jobs.get(result_id)
        if job is None or job.owner != owner:
            raise UnknownResult(result_id, round(self.ttl_s))
        return job

    def of(self, owner: str) -> list[Job]:
        """The owner's jobs whose handles were given out, the newest first."""
        return [job for job in reversed(self._jobs.values()) if job.owner == owner]
