"""What the calls of tools have in common: on whose behalf, progress, disconnects, calls that go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import anyio
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.mcpserver import Context as ToolContext
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult

from mlx_mcp.api.mcp.arguments import LongArguments
from mlx_mcp.api.mcp.consent import can_ask, may_fetch
from mlx_mcp.api.mcp.long_results import part, running
from mlx_mcp.api.mcp.results import compact, reply
from mlx_mcp.api.mcp.waiting import max_chars, name_of, wait_s
from mlx_mcp.errors import ModelError
from mlx_mcp.service.activity import Activity, Meter, Report, progress_line
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.jobs import Job, Work
from mlx_mcp.service.models import to_be_fetched
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

PROGRESS_INTERVAL_S = 0.1  # each notification costs about 0.5 ms of the event loop
R = TypeVar("R")


def tenant() -> str:
    """On whose behalf the call is: sessions and cached keys and values are never shared between two.

    The verified principal over HTTP with a token; everyone else is one.
    """
    token = get_access_token()
    return "" if token is None else token.client_id


def progress_reporter(context: ToolContext) -> Report:
    """Sends the progress of one or more generations, at most ten times a second and always upwards, as hosts want."""
    last, value = 0.0, 0.0

    async def report(meters: Sequence[Meter]) -> None:
        nonlocal last, value
        now = time.monotonic()
        if now - last < PROGRESS_INTERVAL_S:
            return
        last = now
        totals = [meter.total for meter in meters]
        # A value that stands still is raised by a hair: hosts take it as a sign of life.
        value = max(float(sum(meter.done for meter in meters)), value + 1e-3)
        total = None if None in totals else sum(total or 0 for total in totals)
        await context.report_progress(value, total, progress_line(meters))

    return report


class ToolSet:
    """What tools need; each method of a subclass is a tool, and its docstring is what a calling model reads of it.

    `wait_s` is how long calls are waited for here, where they do not say it themselves.
    """

    def __init__(
        self,
        service: Service,
        files: FileReader | None = None,
        activity: Activity | None = None,
        wait_s: float | None = None,
    ) -> None:
        self._service, self._files, self._wait_s = service, files or FileReader((), 0, 0), wait_s
        self.activity = activity or Activity()

    def _caller(self, context: ToolContext) -> Caller:
        return Caller(tenant(), self.activity, self._files, name_of(context))

    async def _long(
        self, context: ToolContext, given: LongArguments, tool: str, work: Work, model: str | None = None
    ) -> CallToolResult:
        """The result of work, which returns a shape, or a handle if it is not there by the time to answer.

        Until the handle is given out, the end of the call is the end of the work. If the work uses a `model` that has
        to be downloaded, the user is asked first.
        """
        if model is not None and can_ask(context):
            await self._ask_to_fetch(context, model)
        jobs = self._service.jobs
        job = jobs.start(tenant(), tool, work)
        try:
            ended = await while_connected(context, job.wait(self._seconds(context, given), progress_reporter(context)))
        except BaseException:
            jobs.cancel(job)
            raise
        if not ended:
            jobs.hand_over(job)
            return reply(running(job))
        return self._ended(context, job)

    async def _ask_to_fetch(self, context: ToolContext, model: str) -> None:
        """Ask the user before a model is downloaded.

        Raises:
            ModelError: the user does not want it.
        """
        fetch = await to_be_fetched(self._service, model)
        if fetch is not None and not await may_fetch(context, fetch.name, fetch.num_bytes, fetch.free_bytes):
            raise ModelError(f"Your user does not want {fetch.name} to be downloaded. list_models says which are here.")

    def _ended(self, context: ToolContext, job: Job, offset: int = 0) -> CallToolResult:
        """The result of a job that has ended, from a character on if it is too long for the host."""
        result = reply(job.result())
        job.fetched = True
        limit = max_chars(context)
        if not offset and len(compact(result.structured_content)) <= limit:
            return result
        self._service.jobs.hand_over(job)
        return part(job.result_id, result, offset, limit)

    def _seconds(self, context: ToolContext, given: LongArguments) -> float:
        return wait_s(context, given.wait_s, self._wait_s)


class SandboxToolSet(ToolSet):
    """Tools that need the sandboxes of the process too."""

    def __init__(
        self,
        service: Service,
        sandboxes: Sandboxes,
        files: FileReader | None = None,
        activity: Activity | None = None,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(service, files, activity, wait_s)
        self._sandboxes = sandboxes


async def while_connected(context: ToolContext, work: Coroutine[Any, Any, R]) -> R:
    """Await the work, and cancel it when its HTTP client goes away.

    Newer protocol versions do this in the SDK; for older ones the SDK goes on for a client that can never come back to
    the answer, since no events are stored.
    """
    request = context.request_context.request
    if request is None or not hasattr(request, "receive"):
        return await work
    # A scope and a task, not a task group: that would wrap the work's errors.
    with anyio.CancelScope() as scope:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            scope.cancel()

        watching = asyncio.create_task(watch())
        try:
            return await work
        finally:
            watching.cancel()
    raise ToolError("The client disconnected.")
