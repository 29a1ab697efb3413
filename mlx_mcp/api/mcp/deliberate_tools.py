"""The tool that asks several branches: shapes and words, over what the workflow does."""

from __future__ import annotations

from typing import Annotated

from mcp.server.mcpserver import Context as ToolContext
from mcp_types import CallToolResult
from pydantic import BaseModel

from mlx_mcp.api.mcp.calls import ToolSet
from mlx_mcp.api.mcp.deliberate_arguments import DeliberateArguments
from mlx_mcp.api.mcp.deliberate_results import Deliberation, deliberation
from mlx_mcp.service.activity import Report
from mlx_mcp.workflows.deliberate.deliberate import deliberate


class DeliberateTools(ToolSet):
    """The tool that asks several branches."""

    async def deliberate(self, given: DeliberateArguments, ctx: ToolContext) -> Annotated[CallToolResult, Deliberation]:
        """Ask a panel of branches one question over one context, and get one answer, with how far they agreed.

        For best of n, a majority vote (self-consistency), an ensemble or mixture of agents, a review from several
        perspectives, a second opinion, hard questions that deserve several heads. The context (`session`, or `system`
        and `files`) is computed once; the branches run at once, and none sees another's. `judge`: merge writes one
        answer out of all; vote counts a property of `json_schema`, and stops when a majority is certain; pick has the
        model choose one; split has it write a question for each branch first, then merges.

        Returns {text, session, agreement, branches: [{role, status, text, session, …}], …}. A branch that timed out
        kept what it wrote: generate(session=…) goes on with it. Sessions last an hour without use. Long ones return a
        result_id, as generate does.
        """
        task = given.to_task()

        async def work(report: Report) -> BaseModel:
            return deliberation(await deliberate(self._service, self._caller(ctx), task, report))

        return await self._long(ctx, given, "deliberate", work, None if given.session else given.model)
