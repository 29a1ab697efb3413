"""Asks several branches one thing over one context, and makes one answer of theirs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import anyio

from mlx_mcp.chat.message import Message
from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.errors import GenerationFailed, MlxMcpError
from mlx_mcp.service.activity import Report
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.generate import Options, request_of
from mlx_mcp.service.models import note_of
from mlx_mcp.service.service import Service
from mlx_mcp.service.sessions import create_session
from mlx_mcp.service.values import GenerateRequest, Result, SessionOptions
from mlx_mcp.workflows.counting import Counts
from mlx_mcp.workflows.deliberate.branches import Branches, Came, Status, together
from mlx_mcp.workflows.deliberate.judging import (
    Tally,
    asked_of,
    asked_to_merge,
    asked_to_pick,
    asked_to_split,
    key_of,
    tally_of,
    value_of,
)
from mlx_mcp.workflows.deliberate.task import TTL_S, Branch, Judge, Task, check

JUDGES_SHARE = 4  # one part in so many of the budget is kept for the judge, if it needs as much
KEPT = "What the branches said is in their sessions, which generate goes on with."
JUDGES_TOKENS = 1024  # what it needs at most where `max_tokens` says nothing
NO_ANSWERS = "No branch had begun to answer by its deadline, or within the budget: raise timeout_s or budget_tokens."
NO_VOTES = "No branch gave a whole answer with `{}`, so there was nothing to count. Raise max_tokens or timeout_s."


@dataclass(frozen=True)
class Answered:
    """What a branch was asked, and what came of that; `value` is what it voted for, if it voted."""

    branch: Branch
    came: Came
    value: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Deliberated:
    """The one answer, the session that goes on from it, and how it came about.

    `error` is why there is no answer though there are branches.
    """

    judge: Judge
    text: str
    session: str
    model: str
    branches: tuple[Answered, ...]
    tally: Tally | None
    counts: Counts
    error: str = ""
    note: str = ""


async def deliberate(service: Service, caller: Caller, task: Task, report: Report) -> Deliberated:
    """Ask the branches, and make one answer of theirs; the context is computed once for each model.

    Each branch that has begun keeps its session. If nothing is returned, no session is left.

    Raises:
        InvalidRequest: the task cannot be carried out as it stands.
        MlxMcpError: the context cannot be computed, or every branch failed.
    """
    task = check(task)
    branches = Branches(service, caller, report, task.budget_tokens)
    try:
        with service.observer.workflow("deliberate", caller.tenant, "", lambda: branches.line):
            async with contexts_of(service, caller, task, branches) as contexts:
                return await Deliberation(service, caller, task, branches, contexts).run()
    except BaseException:
        await branches.close()
        raise


@asynccontextmanager
async def contexts_of(
    service: Service, caller: Caller, task: Task, branches: Branches
) -> AsyncIterator[dict[str, str]]:
    """The session with the context for each model, "" where there is none; those made here end with the block."""
    if task.session or not (task.system or task.files):
        yield dict.fromkeys(task.models, task.session)
        return
    made: dict[str, str] = {}

    async def make(model: str) -> None:
        context, options = Context(task.system, task.files), SessionOptions(ttl_s=TTL_S)
        result = (await create_session(service, caller, context, model, (), options, branches.report)).result
        assert result.session is not None, "a context ends in its session"
        made[model] = result.session.session_id
        branches.counts += Counts.of(result)

    try:
        await together([make(model) for model in task.models])
        yield made
    finally:
        with anyio.CancelScope(shield=True), suppress(MlxMcpError):
            if made:
                await service.engine.close_sessions(caller.tenant, tuple(made.values()))


class Deliberation:
    """One of them, on contexts that are there."""

    def __init__(
        self, service: Service, caller: Caller, task: Task, branches: Branches, contexts: dict[str, str]
    ) -> None:
        self.service, self.caller, self.task = service, caller, task
        self.branches, self.contexts = branches, contexts

    async def run(self) -> Deliberated:
        """Ask, and judge."""
        task = self.task
        if task.judge is Judge.SPLIT:
            task = self.task = await self._split()
        answered = await self._ask()
        values = [answer.value[0] for answer in answered if answer.value]
        tally = tally_of(task.vote_on, values) if task.vote_on else None
        error, chosen = "", None
        try:
            chosen = self._winner(answered, tally) if task.judge is Judge.VOTE else await self._judged(answered, tally)
        except MlxMcpError as failure:  # what the branches have said is not lost with it
            error = str(failure)
        session = "" if chosen is None or chosen.session is None else chosen.session.session_id
        return Deliberated(
            task.judge,
            "" if chosen is None else chosen.text,
            session,
            next(each.came.result.model for each in answered if each.came.result is not None),
            tuple(answered),
            tally,
            self.branches.counts,
            error,
            note_of(self.service, task.model or task.session),
        )

    async def _ask(self) -> list[Answered]:
        """Ask the branches.

        Raises:
            MlxMcpError: every one of them failed.
        """
        task, field, open_ = self.task, self.task.vote_on, len(self.task.branches)
        held = task.schema if task.judge is not Judge.SPLIT else None
        requests = [
            self._request(asked_of(task.task, branch.role), branch.model or task.model, held, branch)
            for branch in task.branches
        ]
        votes: dict[int, Any] = {}

        def is_certain(index: int, result: Result) -> bool:
            nonlocal open_
            open_ -= 1
            votes.update((index, value) for value in value_of(result.text, field))
            return tally_of(field, list(votes.values())).is_certain(open_)

        heard = is_certain if task.judge is Judge.VOTE else None
        timeouts = [branch.timeout_s for branch in task.branches]
        came = await self.branches.run(requests, timeouts, self._reserve(), heard)
        if not any(each.result for each in came):
            raise next((each.error for each in came if each.error), GenerationFailed(NO_ANSWERS))
        return [Answered(branch, each, self._vote(each)) for branch, each in zip(task.branches, came, strict=True)]

    def _vote(self, came: Came) -> tuple[Any, ...]:
        whole = came.result is not None and came.status is Status.DONE and self.task.vote_on
        return value_of(came.result.text, self.task.vote_on) if whole and came.result is not None else ()

    def _winner(self, answered: Sequence[Answered], tally: Tally | None) -> Result:
        """The answer of the first branch that voted with the most.

        Raises:
            GenerationFailed: nobody voted.
        """
        assert tally is not None, "a vote is on a field"
        if not tally.counts:
            raise GenerationFailed(NO_VOTES.format(tally.field))
        winning = key_of(tally.counts[0][0])
        result = next(answer.came.result for answer in answered if [*map(key_of, answer.value)] == [winning])
        assert result is not None, "who voted has an answer"
        return result

    async def _judged(self, answered: Sequence[Answered], tally: Tally | None) -> Result:
        """The answer that a judge writes or picks.

        Raises:
            MlxMcpError: there is nothing to judge, or the judge failed.
        """
        task, results = self.task, [answer.came.result for answer in answered]
        texts = [
            (answer.branch.role, "\n".join(filter(None, (result.reasoning, result.text))))
            for answer, result in zip(answered, results, strict=True)
            if result is not None
        ]
        if task.judge is not Judge.PICK:
            asked = asked_to_merge(task, texts, tally, parts=task.judge is Judge.SPLIT)
            return await self._one(asked, task.schema)
        asked, schema = asked_to_pick(task.task, texts)
        choice = int(read(await self._one(asked, schema, keep=False))["choice"])
        return [result for result in results if result is not None][choice - 1]

    async def _split(self) -> Task:
        """The task with a question for each branch.

        Raises:
            MlxMcpError: the model did not write them.
        """
        asked, schema = asked_to_split(self.task.task, len(self.task.branches))
        questions = read(await self._one(asked, schema, keep=False))["questions"]
        branches = [
            replace(branch, role="\n\n".join(filter(None, (f"Answer this part of it alone: {question}", branch.role))))
            for branch, question in zip(self.task.branches, questions, strict=False)
        ]
        return replace(self.task, branches=tuple(branches))

    async def _one(self, asked: str, schema: dict[str, Any] | None, keep: bool = True) -> Result:
        """What the model that judges says.

        Raises:
            GenerationFailed: it has no whole answer.
        """
        request = self._request(asked, self.task.model, schema, Branch(seed=self.task.sampling.seed), keep)
        left = self.branches.left
        if left is not None:
            tokens = min(left, request.sampling.max_tokens or JUDGES_TOKENS)
            request = replace(request, sampling=replace(request.sampling, max_tokens=max(1, tokens)))
        [came] = await self.branches.run([request], [None])
        if came.error is not None:
            raise GenerationFailed(
                f"The judge, which reads every answer, could not answer: {came.error} Lower max_tokens if the answers "
                f"are too long for it. {KEPT}"
            )
        if came.result is None or (schema is not None and came.status is not Status.DONE):
            raise GenerationFailed(
                f"The judge gave no whole answer ({came.status}). Raise max_tokens or budget_tokens. {KEPT}"
            )
        return came.result

    def _reserve(self) -> int:
        """How many tokens of the budget are kept for the judge."""
        if self.task.budget_tokens is None or self.task.judge is Judge.VOTE:
            return 0
        needs = self.task.sampling.max_tokens or JUDGES_TOKENS
        return min(needs, self.task.budget_tokens // JUDGES_SHARE)

    def _request(
        self, asked: str, model: str, schema: dict[str, Any] | None, branch: Branch, keep: bool = True
    ) -> GenerateRequest:
        """What the engine is asked, after the context."""
        task, session = self.task, self.contexts[model]
        sampling = replace(task.sampling, temperature=branch.temperature, seed=branch.seed)
        options = Options(
            "" if session else model,
            session,
            keep,
            grammar=None if schema is None else Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)),
            reasoning=task.reasoning,
            sampling=sampling,
            opening=SessionOptions(ttl_s=TTL_S),
        )
        return request_of(self.caller, (Message("user", asked),), options)


def read(result: Result) -> Any:
    """What a whole answer in JSON says."""
    return json.loads(result.text)
