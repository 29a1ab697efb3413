"""Has a question answered over the input in a sandbox, by the strategy that fits the model and the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_mcp.chat.message import Message
from mlx_mcp.service.activity import Meter, Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.count import count_tokens
from mlx_mcp.service.generate import Options
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.asking import Budget, unheard
from mlx_mcp.workflows.counting import Counts
from mlx_mcp.workflows.reason_over.free import FreeRun, room_of
from mlx_mcp.workflows.reason_over.input import fill
from mlx_mcp.workflows.reason_over.programs import PROGRAMS, SIZE
from mlx_mcp.workflows.reason_over.question import Answer, Purse, Question, Step, Stopped, Strategy, check, fault_of
from mlx_mcp.workflows.reason_over.trial import writes_programs
from mlx_mcp.workflows.sandbox.host_calls import HostFunction
from mlx_mcp.workflows.sandbox.runtime import Limits
from mlx_mcp.workflows.sandbox.sandbox import Program, Ran, Sandbox
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes

MAX_PARTS = 200  # an input of more parts is searched, not read as a whole, by a model that writes no programs
CHILD_SHARE = 4  # a question within a program may have one part in so many of what is left
RLM_QUERY = "rlm_query(question, text)  # for a text that itself is too long to read: as you work, with programs; slow"


@dataclass(frozen=True)
class Reasoned:
    """An answer, and what it took."""

    answer: Answer
    counts: Counts


async def reason_over(
    service: Service,
    caller: Caller,
    sandboxes: Sandboxes,
    sandbox: Sandbox,
    question: Question,
    report: Report,
) -> Reasoned:
    """Answer a question over the variables of a sandbox, `files` or `context` among them, in which programs then run.

    A model that was not tried yet is tried first, where the strategy depends on what it can do.

    Raises:
        InvalidRequest: it cannot be asked so.
        MlxMcpError: the model cannot be asked, or programs cannot be run here.
    """
    check(question)
    question = replace(question, model=question.model or sandbox.model)
    purse, line = Purse(question.budget), "begins"

    async def told(meters: Sequence[Meter]) -> None:
        nonlocal line
        line = meters[0].line
        await report(meters)

    name = sandbox.name or f"{sandbox.sandbox_id[:8]}…"
    with service.observer.workflow("reason_over", caller.tenant, name, lambda: line):
        answer = await Reasoning(service, caller, sandboxes, question, purse, told).run(sandbox)
    return Reasoned(answer, purse.counts)


@dataclass(frozen=True)
class Reasoning:
    """One question, at one depth."""

    service: Service
    caller: Caller
    sandboxes: Sandboxes
    question: Question
    purse: Purse
    report: Report

    async def run(self, sandbox: Sandbox) -> Answer:
        """The answer."""
        messages = (Message("user", self.question.text),)
        options, context = Options(self.question.model), Context(messages=messages)
        counted = await count_tokens(self.service, self.caller, context, options, self.report)
        chunk_chars = room_of(counted.context_tokens).chunk_chars
        strategy = self.question.strategy
        if strategy is Strategy.AUTO:
            strategy = await self._chosen(sandbox, counted.context_tokens, chunk_chars)
        if strategy is Strategy.FREE:
            return await self._free(self.question, sandbox, counted.context_tokens)
        return await self._ours(strategy, sandbox, chunk_chars)

    async def _chosen(self, sandbox: Sandbox, context_tokens: int, chunk_chars: int) -> Strategy:
        """The strategy for a model, and for as much input as there is."""
        await self.report([Meter(line="trying whether the model can write programs, if that is not known")])
        service, caller, model = self.service, self.caller, self.question.model
        if await writes_programs(service, caller, self.sandboxes, model, context_tokens, self.purse):
            return Strategy.FREE
        ran = await self._program(SIZE, sandbox, {}, "its input is measured")
        size = ran.ended.value if ran.ended.error is None and isinstance(ran.ended.value, int) else 0
        return Strategy.MAP_REDUCE if size <= MAX_PARTS * chunk_chars else Strategy.SEARCH

    async def _free(self, question: Question, sandbox: Sandbox, context_tokens: int) -> Answer:
        functions: Mapping[str, HostFunction] = {}
        if question.depth > 1:
            functions = {"rlm_query": HostFunction(RLM_QUERY, self._child)}
        run = FreeRun(
            self.service,
            self.caller,
            self.sandboxes,
            sandbox,
            question,
            self.purse,
            context_tokens,
            self.report,
            functions,
        )
        return await run.run()

    async def _child(self, question: str, text: str) -> Any:
        """A question over a text, in a sandbox of its own; None where there is no answer."""
        left = self.purse.left
        share = Budget(left.calls // CHILD_SHARE, left.tokens // CHILD_SHARE, left.seconds)
        asked = Question(
            str(question), None, self.question.strategy, self.question.model, share, self.question.turns // 2 or 1, 1
        )
        check(asked)
        sandbox = await self.sandboxes.create(self.service, self.caller, model=self.question.model, temporary=True)
        purse = Purse(share)
        try:
            await fill(self.service, self.caller, self.sandboxes, sandbox, {"context": str(text)})
            child = Reasoning(self.service, self.caller, self.sandboxes, asked, purse, unheard)
            return (await child.run(sandbox)).value
        finally:
            self.purse.spend(purse.counts)
            await self.sandboxes.close(self.service, self.caller.tenant, [sandbox])

    async def _ours(self, strategy: Strategy, sandbox: Sandbox, chunk_chars: int) -> Answer:
        """The answer of a program of ours."""
        inputs = {"_question": self.question.text, "_schema": self.question.schema, "_chunk_chars": chunk_chars}
        ran = await self._program(PROGRAMS[strategy], sandbox, inputs, f"{strategy.value} runs")
        error = ran.ended.error
        steps = (Step(ran.counts.calls, len(ran.output), "" if error is None else error.type),)
        if error is not None:
            return Answer(None, Stopped.LIMIT, strategy, steps, f"{error.type}: {error.message}")
        value, unread, parts = (ran.ended.value[name] for name in ("value", "unread", "parts"))
        fault = fault_of(value, self.question.schema)
        if fault:
            return Answer(None, Stopped.LIMIT, strategy, steps, f"the model gave no answer that can be taken. {fault}")
        why = ""
        if unread:
            why = f"the answer leaves out {unread} pieces of {parts} parts, which could not be read: {first_of(ran)}"
        return Answer(value, Stopped.SUBMITTED, strategy, steps, why)

    async def _program(self, code: str, sandbox: Sandbox, inputs: Mapping[str, Any], does: str) -> Ran:
        """Run a program of ours."""

        async def report(meters: Any) -> None:
            await self.report([Meter(done=meter.done, line=f"{does}: {meter.line}") for meter in meters])

        ran = await self.sandboxes.run(
            self.service,
            self.caller,
            sandbox,
            Program(code, inputs),
            Limits(),
            self.purse.left,
            report,
            self.question.model,
        )
        self.purse.spend(ran.counts)
        return ran


def first_of(ran: Ran) -> str:
    """The first error that a model's answer had in a run."""
    return ran.said.failures[0].error if ran.said.failures else "each was too long for the model"
