"""Asks the models many things for one run of a workflow: so many at once, in one lane, within one budget, counted.

Guarantees:
    - At most WINDOW calls of a run are with the engine, and fewer where their principal may have fewer at once.
    - All calls of a run share one lane: however many there are, others' calls get their turns.
    - A call that the engine or the limits of the principal have no room for is made again when there may be room.
    - When a run is cancelled, its calls have ended and their rows are free before that is told.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import anyio

from mlx_mcp.chat.message import Message
from mlx_mcp.errors import BudgetSpent, CapacityError, EngineDead, MlxMcpError, UnknownSession
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options, request_of, run
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.service.sessions import create_session
from mlx_mcp.service.several import closed_unless_whole
from mlx_mcp.service.values import Result, SessionInfo, SessionOptions
from mlx_mcp.workflows.counting import FAILED, Counts

WINDOW = 64  # calls of a run that are with the engine at once
MAX_PAUSE_S = 5.0  # how long a call that there was no room for waits at most before it is made again

Outcome = Result | MlxMcpError


@dataclass(frozen=True)
class Budget:
    """What one run may use of the models. Tokens are those that are computed and written.

    When the tokens are used up, calls that have begun still end; when the time is used up, they are cut off.
    """

    calls: int = 2_000
    tokens: int = 10_000_000
    seconds: float = 3600.0


class Asker:
    """The calls of one run. `report` hears how far they are."""

    def __init__(self, service: Service, caller: Caller, budget: Budget, report: Report, model: str = "") -> None:
        self.service, self.caller, self.budget, self.model = service, caller, budget, model
        self.counts = Counts()
        self.deadline = asyncio.get_running_loop().time() + budget.seconds
        self._meter, self._report = Meter(), report
        self._lane = f"run {secrets.token_hex(8)}"
        limits = service.limits.limits_of(caller.tenant)
        allowed = [limit for limit in (limits.calls_at_once, limits.waiting) if limit is not None]
        self._places = asyncio.Semaphore(max(1, min([WINDOW, *allowed])))
        self._asked = self._running = 0

    async def ask(self, chats: Sequence[tuple[Message, ...]], options: Options) -> list[Outcome]:
        """Answer each chat; what failed has its error in its place. The lane is the run's, as is the model by default.

        Where the tokens or the time are used up on the way, those that are left have BudgetSpent.

        Raises:
            BudgetSpent: there are more than the run may still ask, or its time or tokens are used up.
            EngineDead: the engine thread has ended.
        """
        self.check(len(chats))
        self._asked += len(chats)
        model = "" if options.session else options.model or self.model
        options = replace(options, lane=self._lane, model=model)
        outcomes: dict[int, Outcome] = {}
        left = iter(enumerate(chats))

        async def pull() -> None:
            for index, chat in left:
                try:
                    outcomes[index] = await self._counted(partial(self._answer, chat, options))
                except EngineDead:
                    raise
                except MlxMcpError as error:
                    outcomes[index] = error

        pulls = [asyncio.create_task(pull()) for _ in range(min(WINDOW, len(chats)))]
        try:
            await asyncio.gather(*pulls)
        finally:
            for task in pulls:
                task.cancel()
            await asyncio.gather(*pulls, return_exceptions=True)
        return [outcomes[index] for index in range(len(chats))]

    async def open(self, context: Context, name: str) -> SessionInfo:
        """Compute a context as a session of the caller's, of a name that no other has; it counts as a call.

        Raises:
            BudgetSpent: the budget is used up.
            CapacityError: the caller may have no more sessions.
            MlxMcpError: see `create_session`.
        """
        self.check(1)
        self._asked += 1

        async def make() -> Result:
            options = SessionOptions(name)
            made = await create_session(self.service, self.caller, context, self.model, (), options, unheard)
            return made.result

        async with closed_unless_whole(self.service, self.caller, name):
            result = await self._counted(make, patient=False)
        assert result.session is not None, "a context ends in its session"
        return result.session

    def check(self, num: int) -> None:
        """Check that so many calls may be made.

        Raises:
            BudgetSpent: there are not so many left, or the time or the tokens are used up.
        """
        left = self.budget.calls - self._asked
        if num > left:
            raise BudgetSpent(
                f"These are {num} calls, and this run may make {max(0, left)} more (of {self.budget.calls}). Ask "
                "fewer, have plain Python do what it can, or run again with a larger max_calls."
            )
        self._check_spent()

    @property
    def line(self) -> str:
        """How far the run is."""
        return f"{self.counts.calls} of {self._asked} answers, {self._running} running"

    def _check_spent(self) -> None:
        if asyncio.get_running_loop().time() >= self.deadline:
            raise self._time_spent()
        if self.counts.spent_tokens >= self.budget.tokens:
            raise BudgetSpent(
                f"This run has had {self.counts.spent_tokens} tokens computed and written, and may have "
                f"{self.budget.tokens}. Ask fewer or shorter questions, or run again with a larger max_tokens_in_all."
            )

    def _time_spent(self) -> BudgetSpent:
        return BudgetSpent(
            f"This run has used the {self.budget.seconds:g} s that it may take. Ask fewer, or run again with a larger "
            "timeout_s."
        )

    async def _counted(self, call: Callable[[], Awaitable[Result]], patient: bool = True) -> Result:
        """Make a call when there is a place for it, and count it."""
        counts = FAILED
        try:
            async with asyncio.timeout_at(self.deadline), self._places:
                self._running += 1
                try:
                    result = await self._made(call, patient)
                finally:
                    self._running -= 1
            counts = Counts.of(result)
            return result
        except TimeoutError:
            raise self._time_spent() from None
        finally:
            self.counts += counts
            await self._tell()

    async def _made(self, call: Callable[[], Awaitable[Result]], patient: bool) -> Result:
        """Make a call, again and again while there is no room for it; if not `patient`, while there is to be soon."""
        await self._tell()
        while True:
            self._check_spent()
            try:
                return await call()
            except CapacityError as full:
                if not patient and full.retry_after_s > MAX_PAUSE_S:
                    raise
                await asyncio.sleep(min(full.retry_after_s, MAX_PAUSE_S))

    async def _answer(self, chat: tuple[Message, ...], options: Options) -> Result:
        meter = Meter()

        async def report() -> None:
            """Tell what the model's load says: nothing else is heard of one of many answers."""
            if meter.total is None and not meter.deltas and meter.line and not self.counts.calls:
                await self._tell(meter.line)

        return await run(self.service, self.caller, request_of(self.caller, chat, options), meter, report)

    async def _tell(self, more: str = "") -> None:
        """Tell how far the run is: one meter for all calls, since nothing of their texts is for whoever watches."""
        self._meter.line = f"{self.line}; {more}" if more else self.line
        self._meter.done = self.counts.calls
        await self._report([self._meter])


async def close_sessions(service: Service, owner: str, sessions: Collection[str]) -> None:
    """Close sessions of a run that nothing needs any more, whoever is cancelled meanwhile; some may have ended."""
    with anyio.CancelScope(shield=True):
        for session in sessions:
            with suppress(MlxMcpError):
                await service.engine.close_sessions(owner, (session,))


async def fork_all(service: Service, caller: Caller, session: str, num: int) -> list[str]:
    """The handles of so many forks of a session; its own if it has ended, so that its use says so."""
    try:
        with service.limits.opening(caller.tenant, num, known_sessions(service).values()):
            return [fork.session_id for fork in await service.engine.fork(caller.tenant, session, num)]
    except UnknownSession:
        return [session] * num


async def unheard(meters: Sequence[Meter]) -> None:
    """Take a report that is told otherwise."""
