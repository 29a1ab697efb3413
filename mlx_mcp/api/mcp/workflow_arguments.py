"""What can be said to the tools that run programs beside the models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mlx_mcp.api.mcp.arguments import LongArguments, option
from mlx_mcp.service.files import MAX_TEXTS
from mlx_mcp.workflows.asking import Budget
from mlx_mcp.workflows.sandbox.runtime import Limits

MEBI = 1 << 20
BUDGET, LIMITS = Budget(), Limits()


class BudgetArguments(LongArguments):
    """Of tools whose programs ask the models: how much of them."""

    max_calls: Annotated[
        int,
        Field(
            ge=0,
            le=100_000,
            strict=True,
            json_schema_extra=option(f"max_calls ({BUDGET.calls:,} questions to the model a run)"),
        ),
    ] = BUDGET.calls
    max_tokens_in_all: Annotated[
        int,
        Field(
            ge=0,
            le=10**10,
            strict=True,
            json_schema_extra=option(f"max_tokens_in_all ({BUDGET.tokens:,} computed and written)"),
        ),
    ] = BUDGET.tokens
    timeout_s: Annotated[
        float, Field(gt=0, le=86_400, json_schema_extra=option(f"timeout_s ({BUDGET.seconds:g} in all)"))
    ] = BUDGET.seconds

    def budget(self) -> Budget:
        """What the run may use of the models."""
        return Budget(self.max_calls, self.max_tokens_in_all, self.timeout_s)


class SandboxArguments(BudgetArguments):
    """Of `sandbox_run`."""

    code: Annotated[
        str, Field(max_length=MEBI, description="Python; without it the sandbox is made, filled and described.")
    ] = ""
    sandbox: Annotated[str, Field(description="Handle or name of one to go on in; else a new one is made.")] = ""
    name: Annotated[str, Field(description="Of a new one: stands for its handle.")] = ""
    files: Annotated[
        list[str] | None,
        Field(
            max_length=MAX_TEXTS,
            description="Paths and globs (src/**/*.py), read by the server: `files` is {path: text}, and of a single "
            "file `context` is the text.",
        ),
    ] = None
    context: Annotated[str, Field(description="A text that the code finds as `context`; better name `files`.")] = ""
    model: Annotated[str, Field(description="That is asked, if not the default.")] = ""
    python_s: Annotated[
        float, Field(gt=0, le=600, json_schema_extra=option(f"python_s ({LIMITS.seconds:g} of Python itself)"))
    ] = LIMITS.seconds
    memory_mb: Annotated[
        int, Field(ge=8, le=4_096, strict=True, json_schema_extra=option(f"memory_mb ({LIMITS.memory_bytes // MEBI})"))
    ] = LIMITS.memory_bytes // MEBI
    output_chars: Annotated[
        int, Field(ge=1, le=100_000, strict=True, json_schema_extra=option("output_chars (10,000 come back)"))
    ] = 10_000

    def limits(self) -> Limits:
        """What the program may use."""
        return Limits(self.python_s, self.memory_mb * MEBI, LIMITS.output_chars)
