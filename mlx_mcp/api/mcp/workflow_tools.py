"""The tools that run programs beside the models: shapes and words, over what workflows do."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from mcp.server.mcpserver import Context as ToolContext
from mcp_types import CallToolResult
from pydantic import BaseModel

from mlx_mcp.api.mcp.calls import SandboxToolSet
from mlx_mcp.api.mcp.workflow_arguments import SandboxArguments
from mlx_mcp.api.mcp.workflow_results import SandboxRun, described, left_out, run_of
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.activity import Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.files import Texts
from mlx_mcp.workflows.sandbox.host_calls import FUNCTIONS
from mlx_mcp.workflows.sandbox.sandbox import Program, Sandbox

NOTHING = "None"  # a program that only takes its inputs


class WorkflowTools(SandboxToolSet):
    """Tools that run programs over many calls of the models."""

    async def sandbox_run(self, given: SandboxArguments, ctx: ToolContext) -> Annotated[CallToolResult, SandboxRun]:
        """Run Python beside the local model, over input that is too large for you: logs, a repository, 500 tickets.

        Map-reduce, classify, label or extract over hundreds of texts (recursive language model, RLM, REPL): the code
        reads `files`, asks the model, and adds up; only what it prints or submits comes back. Variables stay: go on
        with `sandbox`, fork_session for each sub-agent, close_session at the end.

        In the code: llm_map(instruction, items, schema), llm_ask(text, questions, schema), llm_query_batched(prompts,
        text, schema) ask many at once; llm_query(prompt, text, schema) one; a JSON `schema` gives parsed objects, None
        is a failure. remember(text, name) computes a text once, for over=name. submit(value) ends. No network, no files
        but `files`; installed packages only where `isolation` says CPython.

        Returns {sandbox, output, value, variables, calls: {calls, cached_tokens, computed_tokens, …}, failed,
        isolation, error: {type, message, line, hint}}. Long ones return a result_id, as generate does.
        """

        async def work(report: Report) -> BaseModel:
            return await self._run(self._caller(ctx), given, report)

        return await self._long(ctx, given, "sandbox_run", work, None if given.sandbox else given.model)

    async def _run(self, caller: Caller, given: SandboxArguments, report: Report) -> SandboxRun:
        sandboxes = self._sandboxes
        isolation = (await sandboxes.runtime()).isolation
        await sandboxes.ready(self._service)
        texts = await asyncio.to_thread(caller.files.texts, given.files) if given.files else Texts()
        inputs = inputs_of(given, texts)
        if not given.sandbox:
            sandbox = await sandboxes.create(self._service, caller, given.name, given.model)
        elif given.name:
            raise InvalidRequest("`name` is for a new sandbox: leave out `name` or `sandbox`.")
        else:
            sandbox = sandboxes.get(caller.tenant, given.sandbox)
        if not given.code.strip() and not inputs:
            return described(sandboxes.info(sandbox), isolation, left_out(texts), functions=[*FUNCTIONS.values()])
        program = Program(given.code if given.code.strip() else NOTHING, inputs)
        try:
            ran = await sandboxes.run(
                self._service, caller, sandbox, program, given.limits(), given.budget(), report, given.model
            )
        except BaseException:
            if not given.sandbox:  # nobody knows its handle
                await self._close(sandbox)
            raise
        return run_of(ran, sandboxes.info(sandbox), isolation, texts, given.output_chars)

    async def _close(self, sandbox: Sandbox) -> None:
        await self._sandboxes.close(self._service, sandbox.owner, [sandbox])


def inputs_of(given: SandboxArguments, texts: Texts) -> dict[str, Any]:
    """The variables that a program finds.

    Raises:
        InvalidRequest: there would be two texts as `context`.
    """
    inputs: dict[str, Any] = {}
    if given.files:
        inputs["files"] = texts.files
        if len(texts.files) == 1:
            [inputs["context"]] = texts.files.values()
    if given.context:
        if "context" in inputs:
            raise InvalidRequest("A single file is `context` already: give `files` or `context`, not both.")
        inputs["context"] = given.context
    return inputs
