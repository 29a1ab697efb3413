"""The tool that answers questions over long input: shapes and words, over what the workflow does."""

from __future__ import annotations

from typing import Annotated

from mcp.server.mcpserver import Context as ToolContext
from mcp_types import CallToolResult
from pydantic import BaseModel

from mlx_mcp.api.mcp.calls import SandboxToolSet
from mlx_mcp.api.mcp.reason_arguments import ReasonArguments
from mlx_mcp.api.mcp.reason_results import Reasoning, reasoning
from mlx_mcp.service.activity import Report
from mlx_mcp.workflows.reason_over.input import filled
from mlx_mcp.workflows.reason_over.question import check
from mlx_mcp.workflows.reason_over.reason_over import reason_over


class ReasonTools(SandboxToolSet):
    """The tool that answers questions over long input."""

    async def reason_over(self, given: ReasonArguments, ctx: ToolContext) -> Annotated[CallToolResult, Reasoning]:
        """Answer a question over input that is too long for any prompt: logs, a repository, chats, hundreds of files.

        A local model works it through here; nothing of the input comes to you but the answer. One of `files`, `sandbox`
        and `session` is the input. `strategy`: free has the model write programs and ask itself about parts (recursive
        language model, RLM); map_reduce reads every part, then puts together what was found; search reads the parts
        with the words that an answer would have (grep, retrieval); auto is free for models that can write programs,
        which is tried once. To write the programs yourself use sandbox_run.

        Returns {answer, stopped, why, strategy, programs, calls, isolation}. stopped: "submitted" is an answer it was
        sure of; "extracted" its best guess after it had to stop; "limit" none, and `why` says what to raise. Long ones
        return a result_id, as generate does.
        """
        question = given.to_question()
        check(question)

        async def work(report: Report) -> BaseModel:
            service, caller, sandboxes = self._service, self._caller(ctx), self._sandboxes
            async with filled(service, caller, sandboxes, given.over(), given.model, given.keep) as there:
                made = await reason_over(service, caller, sandboxes, there.sandbox, question, report)
            isolation = (await sandboxes.runtime()).isolation
            return reasoning(made, there, isolation, given.keep)

        return await self._long(ctx, given, "reason_over", work, given.model)
