"""What can be said to `reason_over`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_mcp.api.mcp.arguments import option
from mlx_mcp.api.mcp.workflow_arguments import BUDGET, BudgetArguments
from mlx_mcp.service.files import MAX_TEXTS
from mlx_mcp.workflows.reason_over.input import Input
from mlx_mcp.workflows.reason_over.question import MAX_DEPTH, Question, Strategy


class ReasonArguments(BudgetArguments):
    """Of `reason_over`."""

    question: Annotated[str, Field(description="What you want to know of the input; it must stand alone.")]
    files: Annotated[
        list[str] | None,
        Field(max_length=MAX_TEXTS, description="Paths and globs (src/**/*.py), read by the server."),
    ] = None
    sandbox: Annotated[str, Field(description="Or handle or name of a sandbox, whose variables are the input.")] = ""
    session: Annotated[str, Field(description="Or of a session: what was said in it is the input.")] = ""
    json_schema: Annotated[dict[str, Any] | None, Field(description="The answer is JSON that obeys it.")] = None
    strategy: Annotated[
        Literal["auto", "map_reduce", "search", "free"], Field(description="How the input is worked through.")
    ] = "auto"
    model: Annotated[str, Field(description="A name from list_models, if not the default.")] = ""
    max_programs: Annotated[
        int, Field(ge=1, le=100, strict=True, json_schema_extra=option("max_programs (20 that the model may write)"))
    ] = 20
    depth: Annotated[
        int,
        Field(
            ge=1,
            le=MAX_DEPTH,
            strict=True,
            json_schema_extra=option("depth (2: its programs may ask such questions over texts themselves)"),
        ),
    ] = 1
    keep: Annotated[
        bool, Field(json_schema_extra=option("keep (true: the sandbox with all variables stays, and comes back)"))
    ] = False
    max_calls: Annotated[
        int, Field(ge=1, le=100_000, strict=True, json_schema_extra=option(f"max_calls ({BUDGET.calls:,} of models)"))
    ] = BUDGET.calls

    def over(self) -> Input:
        """What it is asked over."""
        return Input(tuple(self.files or ()), self.sandbox, self.session)

    def to_question(self) -> Question:
        """What is asked, and what may be used for it."""
        return Question(
            self.question,
            self.json_schema,
            Strategy(self.strategy),
            self.model,
            self.budget(),
            self.max_programs,
            self.depth,
        )
