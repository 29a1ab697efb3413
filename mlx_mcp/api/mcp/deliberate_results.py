"""What `deliberate` returns, of what came of a deliberation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel

from mlx_mcp.api.mcp.workflow_results import Calls
from mlx_mcp.workflows.deliberate.deliberate import Answered, Deliberated
from mlx_mcp.workflows.deliberate.judging import Tally

MAX_CHARS = 1_000  # of each branch's text: its session has all of it


class BranchAnswer(BaseModel):
    """One branch: what it said, or why it says nothing, and what it cost."""

    role: str | None = None
    status: Literal["done", "length", "timed_out", "budget", "not_needed", "failed"]
    text: str | None = None
    chars: int | None = None  # of the whole text, if that is longer
    value: Any = None
    session: str | None = None
    model: str | None = None
    cached_tokens: int
    computed_tokens: int
    written_tokens: int
    error: str | None = None


class Votes(BaseModel):
    """A value, and how many voted for it."""

    value: Any
    votes: int


class Agreement(BaseModel):
    """How far the branches agreed on a property."""

    field: str
    votes: int
    of: int
    tied: bool
    counts: list[Votes]


class Deliberation(BaseModel):
    """What `deliberate` returns. `calls` are all calls, the context's and the judge's among them."""

    text: str | None = None
    judge: Literal["vote", "merge", "pick", "split"]
    model: str
    session: str | None = None
    agreement: Agreement | None = None
    branches: list[BranchAnswer]
    calls: Calls
    error: str | None = None
    note: str | None = None


def deliberation(made: Deliberated) -> Deliberation:
    """All that is told of a deliberation."""
    return Deliberation(
        text=made.text or None,
        judge=made.judge.value,
        model=made.model,
        session=made.session or None,
        agreement=None if made.tally is None or not made.tally.counts else agreement(made.tally),
        branches=[branch_answer(each) for each in made.branches],
        calls=Calls(**asdict(made.counts) | {"failed": made.counts.failed or None}),
        error=made.error or None,
        note=made.note or None,
    )


def branch_answer(answered: Answered) -> BranchAnswer:
    """What is told of a branch."""
    result, counts = answered.came.result, answered.came.counts
    text = "" if result is None else result.text
    return BranchAnswer(
        role=answered.branch.role or None,
        status=answered.came.status.value,
        text=text[:MAX_CHARS] or None,
        chars=len(text) if len(text) > MAX_CHARS else None,
        value=answered.value[0] if answered.value else None,
        session=None if result is None or result.session is None else result.session.session_id,
        model=None if result is None else result.model,
        cached_tokens=counts.cached_tokens,
        computed_tokens=counts.computed_tokens,
        written_tokens=counts.written_tokens,
        error=None if answered.came.error is None else str(answered.came.error),
    )


def agreement(tally: Tally) -> Agreement:
    """What is told of a vote."""
    counts = [Votes(value=value, votes=votes) for value, votes in tally.counts]
    return Agreement(field=tally.field, votes=tally.votes, of=tally.of, tied=tally.tied, counts=counts)
