"""The tools that generate, and those for calls that go on: shapes and words, over what the service does."""

from __future__ import annotations

from typing import Annotated

from mcp.server.mcpserver import Context as ToolContext
from mcp_types import CallToolResult
from pydantic import BaseModel

from mlx_mcp.api.mcp.answer_arguments import BatchArguments, CountArguments, GenerateArguments
from mlx_mcp.api.mcp.calls import ToolSet, progress_reporter, while_connected
from mlx_mcp.api.mcp.deliberate_tools import DeliberateTools
from mlx_mcp.api.mcp.long_results import running
from mlx_mcp.api.mcp.model_tools import ModelTools
from mlx_mcp.api.mcp.reason_tools import ReasonTools
from mlx_mcp.api.mcp.result_arguments import CancelArguments, GetResultArguments
from mlx_mcp.api.mcp.results import reply
from mlx_mcp.api.mcp.session_tools import SessionTools
from mlx_mcp.api.mcp.strict_tool import StrictTool
from mlx_mcp.api.mcp.workflow_tools import WorkflowTools
from mlx_mcp.api.web.results import Batch, CancelledCall, Generation, TokenCount
from mlx_mcp.api.web.translate import batch, cancelled, generation, result_list, token_count
from mlx_mcp.service.activity import Activity, Report
from mlx_mcp.service.batch import generate_batch
from mlx_mcp.service.count import count_tokens
from mlx_mcp.service.files import FileReader
from mlx_mcp.service.generate import generate
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes, no_runtime

CANCEL_S = 5.0  # what ends within that time is said to have ended
# Hosts run the calls of one turn in parallel only for read-only tools; generating changes nothing of a user's.
HARMLESS = {"read_only_hint": True, "destructive_hint": False}


def make_tools(
    service: Service,
    files: FileReader | None = None,
    activity: Activity | None = None,
    wait_s: float | None = None,
    sandboxes: Sandboxes | None = None,
) -> list[StrictTool]:
    """The tools over a service, in the order in which hosts show them; without `files` none can be read.

    The `sandboxes` are those of the process; None makes some of their own.

    `wait_s` is how long a call is waited for before it is answered with a handle; None leaves that to the host's name.
    """
    activity = activity or Activity()
    tools = AnswerTools(service, files, activity, wait_s)
    sandboxes = Sandboxes(no_runtime) if sandboxes is None else sandboxes
    sessions = SessionTools(service, sandboxes, files, activity, wait_s)
    workflows = WorkflowTools(service, sandboxes, files, activity, wait_s)
    models = ModelTools(service, files, activity, wait_s)
    reasoning = ReasonTools(service, sandboxes, files, activity, wait_s)
    deliberating = DeliberateTools(service, files, activity, wait_s)
    make, again, once = StrictTool.make, {**HARMLESS, "idempotent_hint": True}, {**HARMLESS, "idempotent_hint": False}
    safe = {"read_only_hint": False, "destructive_hint": False, "idempotent_hint": True}
    return [
        make(tools.generate, "Generate text", daily=True, long=True, **once),
        make(tools.generate_batch, "Generate many texts", daily=True, long=True, **once),
        make(deliberating.deliberate, "Ask several branches, and judge", long=True, **once),
        make(tools.get_result, "Get the result of a long call", daily=True, long=True, **again),
        make(tools.cancel, "Cancel a long call", **safe | {"destructive_hint": True}),
        make(sessions.create_session, "Create a session", daily=True, long=True, **once),
        make(sessions.fork_session, "Fork a session", daily=True, **once),
        make(sessions.persist_session, "Persist a session", long=True, **safe),
        make(sessions.list_sessions, "List sessions", **again),
        make(sessions.close_session, "Close sessions", **safe | {"destructive_hint": True}),
        make(workflows.sandbox_run, "Run Python beside the model", long=True, **once),
        make(reasoning.reason_over, "Answer a question over long input", long=True, **once),
        make(models.list_models, "List models", **again),
        make(models.load_model, "Load a model", long=True, **again),
        make(models.unload_model, "Unload a model", **again),
        make(tools.count_tokens, "Count tokens", long=True, **again),
    ]


class AnswerTools(ToolSet):
    """Tools that generate, and tools for what of it goes on."""

    async def generate(self, given: GenerateArguments, ctx: ToolContext) -> Annotated[CallToolResult, Generation]:
        """Generate text with a language model on this machine; nothing leaves it.

        For work that needs no further tools: summaries, drafts, extraction, classification, a second opinion. Calls run
        in parallel; many prompts over one context go in generate_batch. The model sees `system`, `files`, `prompt` and
        its `session`, nothing else. For data give `json_schema`.

        Returns {text, finish_reason, session, reasoning, tool_calls, cached_tokens, …}; "length" means that max_tokens
        cut it off. A call that takes long returns {status: "running", result_id}: get_result waits for it. A turn that
        fails leaves its session as it was.
        """

        async def work(report: Report) -> BaseModel:
            answered = await generate(self._service, self._caller(ctx), given.context(), given.how(), report)
            return generation(answered.result, answered.note)

        return await self._long(ctx, given, "generate", work, None if given.session else given.model)

    async def generate_batch(self, given: BatchArguments, ctx: ToolContext) -> Annotated[CallToolResult, Batch]:
        """Answer many prompts at once over one context, which is computed once: at most 64, prompts × n.

        To ask many things of one text, to do one thing to many texts, or to choose among `n` answers. The context is a
        `session`, or `system` and `files`; no branch sees another.

        Returns {results: [{text, finish_reason, session, …}]} in the order of the prompts, n for each; a branch that
        fails has {error} alone. Long ones return a result_id, as generate does.
        """

        async def work(report: Report) -> BaseModel:
            made = await generate_batch(
                self._service, self._caller(ctx), given.context(), given.prompts, given.n, given.how(), report
            )
            return batch(made)

        return await self._long(ctx, given, "generate_batch", work, None if given.session else given.model)

    async def get_result(self, given: GetResultArguments, ctx: ToolContext) -> CallToolResult:
        """Wait for a call that still runs, by its result_id; returns what that call would have returned.

        If it runs on, {status: "running", progress, text} has what there is; call again. Results stay for an hour after
        their end, for all who share your access.
        """
        jobs = self._service.jobs
        if not given.result_id:
            return reply(result_list(jobs.of(self._caller(ctx).tenant)))
        job = jobs.get(self._caller(ctx).tenant, given.result_id)
        waiting = job.wait(self._seconds(ctx, given), progress_reporter(ctx))
        if not await while_connected(ctx, waiting):
            return reply(running(job))
        return self._ended(ctx, job, given.offset)

    async def cancel(self, given: CancelArguments, ctx: ToolContext) -> Annotated[CallToolResult, CancelledCall]:
        """Stop a generation, batch or other long call that still runs, by its result_id, and free what it holds.

        A turn that is cut off leaves its session as it was. Returns {result_id, status}: "cancelled", or "done" or
        "failed" if it had ended before.
        """
        job = self._service.jobs.get(self._caller(ctx).tenant, given.result_id)
        self._service.jobs.cancel(job)
        await job.wait(CANCEL_S)
        return reply(cancelled(job))

    async def count_tokens(self, given: CountArguments, ctx: ToolContext) -> Annotated[CallToolResult, TokenCount]:
        """Count how many tokens a prompt takes, with its chat template, and how many the context window leaves.

        Use it before a long text or many files are sent, to see whether they fit. Nothing is generated.

        Returns {tokens, model, context_tokens, left_tokens}, the tokens of the `session` included.
        """

        async def work(report: Report) -> BaseModel:
            counted = await count_tokens(self._service, self._caller(ctx), given.context(), given.how(), report)
            return token_count(counted)

        return await self._long(ctx, given, "count_tokens", work, None if given.session else given.model)
