"""What `reason_over` returns, of what came of a question."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel

from mlx_mcp.api.mcp.workflow_results import Calls, left_out
from mlx_mcp.workflows.reason_over.input import Filled
from mlx_mcp.workflows.reason_over.reason_over import Reasoned


class ProgramRun(BaseModel):
    """One program of a run: what it cost, and the kind of exception that it ended with."""

    calls: int
    printed_chars: int
    error: str | None = None


class Reasoning(BaseModel):
    """What `reason_over` returns."""

    answer: Any = None
    stopped: Literal["submitted", "extracted", "limit"]
    why: str | None = None
    strategy: str
    programs: list[ProgramRun]
    sandbox: str | None = None
    isolation: str
    calls: Calls
    note: str | None = None


def reasoning(made: Reasoned, filled: Filled, isolation: str, keep: bool) -> Reasoning:
    """All that is told of a question."""
    answer = made.answer
    return Reasoning(
        answer=answer.value,
        stopped=answer.stopped.value,
        why=answer.why or None,
        strategy=answer.strategy.value,
        programs=[
            ProgramRun(calls=step.calls, printed_chars=step.printed_chars, error=step.error or None)
            for step in answer.steps
        ],
        sandbox=filled.sandbox.sandbox_id if keep else None,
        isolation=isolation,
        calls=Calls(**asdict(made.counts) | {"failed": made.counts.failed or None}),
        note=left_out(filled.texts) or None,
    )
