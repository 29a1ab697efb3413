"""The tasks extension (SEP-2663): a call that goes on is a task, for clients that say they take one.

A task is a job under the same handle. Tasks ask for no input, so `tasks/update` has nothing to deliver.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from mcp import MCPError
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension, MethodBinding
from mcp.server.mcpserver.server import require_client_extension
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS, CallToolRequestParams, CallToolResult, RequestParams, TextContent
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import Field

from mlx_mcp.api.mcp.calls import tenant
from mlx_mcp.api.mcp.results import reply
from mlx_mcp.api.mcp.waiting import TASKS, takes_tasks
from mlx_mcp.errors import EngineDead, MlxMcpError, UnknownResult
from mlx_mcp.service.activity import progress_line
from mlx_mcp.service.jobs import Job, Jobs, JobState

POLL_MS = 1000
STATUS = {
    JobState.RUNNING: "working",
    JobState.DONE: "completed",
    JobState.FAILED: "completed",  # with a tool's error: `failed` is for errors of the protocol alone
    JobState.CANCELLED: "cancelled",
}
Context = ServerRequestContext[Any, Any]


class TaskParams(RequestParams):
    """Names a task."""

    task_id: str = Field(alias="taskId")


class TaskUpdateParams(TaskParams):
    """Names a task and answers what it asked for."""

    input_responses: dict[str, Any] = Field(default_factory=dict, alias="inputResponses")


class Tasks(Extension):
    """Serves the jobs of a process as tasks."""

    identifier = TASKS

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def methods(self) -> Sequence[MethodBinding]:
        """The methods of the extension, in the era that has it."""
        of = frozenset(MODERN_PROTOCOL_VERSIONS)
        return [
            MethodBinding("tasks/get", TaskParams, self._get, of),
            MethodBinding("tasks/update", TaskUpdateParams, self._update, of),
            MethodBinding("tasks/cancel", TaskParams, self._cancel, of),
        ]

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: Context, call_next: CallNext
    ) -> HandlerResult:
        """A task in place of the result that a call goes on; of get_result too, which then is a task itself."""
        result = await call_next(ctx)
        structured = result.structured_content if isinstance(result, CallToolResult) else None
        if not structured or structured.get("status") != JobState.RUNNING.value or not takes_tasks(ctx):
            return result
        job = self._jobs.get(tenant(), structured["result_id"])
        return {"resultType": "task", **self._seed(job)}

    async def _get(self, ctx: Context, params: TaskParams) -> dict[str, Any]:
        job = self._job(ctx, params)
        return {"resultType": "complete", **self._seed(job), **outcome(job)}

    async def _update(self, ctx: Context, params: TaskUpdateParams) -> dict[str, Any]:
        self._job(ctx, params)
        return {}

    async def _cancel(self, ctx: Context, params: TaskParams) -> dict[str, Any]:
        self._jobs.cancel(self._job(ctx, params))
        return {}

    def _job(self, ctx: Context, params: TaskParams) -> Job:
        """The caller's job.

        Raises:
            MCPError: there is none, or the client does not take tasks.
        """
        require_client_extension(ctx, TASKS)
        try:
            return self._jobs.get(tenant(), params.task_id)
        except UnknownResult as error:
            raise MCPError(INVALID_PARAMS, str(error)) from error

    def _seed(self, job: Job) -> dict[str, Any]:
        """What every answer says of a task."""
        made: dict[str, Any] = {
            "taskId": job.result_id,
            "status": "failed" if isinstance(job.error, EngineDead) else STATUS[job.state],
            "createdAt": timestamp(job.began_at),
            "lastUpdatedAt": timestamp(job.changed_at),
            "ttlMs": None if job.state is JobState.RUNNING else self._ttl_ms(job),
            "pollIntervalMs": POLL_MS,
        }
        said = str(job.error) if job.error is not None else progress_line(job.meters)
        return made | ({"statusMessage": said} if job.state is not JobState.DONE else {})

    def _ttl_ms(self, job: Job) -> int:
        """How long a task is kept, counted from its beginning as the extension does."""
        return round(1000 * (job.changed_at - job.began_at + self._jobs.ttl_s))


def outcome(job: Job) -> dict[str, Any]:
    """What an ended task has beside its state: the result of its call, a tool's error included, or the error."""
    if job.state in (JobState.RUNNING, JobState.CANCELLED):
        return {}
    job.fetched = True
    if isinstance(job.error, EngineDead):
        return {"error": {"code": INTERNAL_ERROR, "message": str(job.error)}}
    if job.error is None:
        result = reply(job.outcome)
    else:
        said = str(job.error) if isinstance(job.error, MlxMcpError) else f"The call failed: {job.error!r}."
        result = CallToolResult(content=[TextContent(type="text", text=said)], is_error=True)
    return {"result": result.model_dump(mode="json", by_alias=True, exclude_none=True)}


def timestamp(seconds: float) -> str:
    """A time in ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
