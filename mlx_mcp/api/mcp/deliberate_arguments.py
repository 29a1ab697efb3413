"""What can be said to `deliberate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlx_mcp.api.mcp.arguments import ContextArguments, option, switch
from mlx_mcp.api.mcp.as_sent import AsSent, from_json
from mlx_mcp.api.mcp.sampling_arguments import with_sampling
from mlx_mcp.api.web.sampling import sampling_of
from mlx_mcp.chat.prompt import Reasoning
from mlx_mcp.service.batch import MAX_BRANCHES
from mlx_mcp.workflows.deliberate.task import Branch, Judge, Task, branches_of

ALIKE = 5  # how many branches there are where nothing says it

TimeoutS = Annotated[float | None, Field(gt=0, le=86_400, description="Each branch ends then; what it wrote is kept.")]


def role_as_sent(given: Any) -> Any:
    """A branch that is given as its role alone."""
    read = from_json(given, (dict,))
    return {"role": read} if isinstance(read, str) else read


class GivenBranch(AsSent, BaseModel):
    """A branch."""

    model_config = ConfigDict(extra="forbid")

    role: str = ""
    model: str = ""
    temperature: Annotated[float | None, Field(ge=0, le=5)] = None
    seed: Annotated[int | None, Field(ge=0, le=2**32 - 1)] = None
    timeout_s: Annotated[float | None, Field(gt=0, le=86_400)] = None

    def to_branch(self) -> Branch:
        """The branch."""
        return Branch(self.role, self.model, self.temperature, self.seed, self.timeout_s)


@with_sampling(without=("logprobs", "logit_bias", "stop"))
class DeliberateArguments(ContextArguments):
    """Of `deliberate`."""

    task: Annotated[str, Field(description="What every branch does, with all it needs to know beside the context.")]
    branches: Annotated[
        list[Annotated[GivenBranch, BeforeValidator(role_as_sent)]] | None,
        Field(
            max_length=MAX_BRANCHES,
            description="Each has a role, which comes after the task: “As a security reviewer: …”; texts are roles.",
        ),
    ] = None
    n: Annotated[
        int | None,
        Field(ge=1, le=MAX_BRANCHES, strict=True, description="Branches of each role; 1, or without roles 5 alike."),
    ] = None
    judge: Annotated[
        Literal["merge", "vote", "pick", "split"],
        Field(description="How one answer comes of theirs."),
    ] = "merge"
    session: Annotated[str, Field(description="Handle or name of the session that every branch goes on from.")] = ""
    json_schema: Annotated[dict[str, Any] | None, Field(description="The answers are JSON that obeys it.")] = None
    vote_on: Annotated[str, Field(description="The property that is counted; needed if there are several.")] = ""
    timeout_s: TimeoutS = None
    budget_tokens: Annotated[
        int | None,
        Field(
            ge=16, strict=True, json_schema_extra=option("budget_tokens (all may write so many, the judge included)")
        ),
    ] = None
    reasoning: Annotated[
        Literal["off", "on", "low", "medium", "high"] | None,
        BeforeValidator(switch),
        Field(json_schema_extra=option("reasoning (off, on, low, medium, high)")),
    ] = None

    def to_task(self) -> Task:
        """What is asked of whom.

        Raises:
            InvalidRequest: branches would all write the same.
        """
        given = [each.to_branch() for each in self.branches or ()]
        sampling = sampling_of(self)
        return Task(
            self.task,
            branches_of(given, self.n or (1 if given else ALIKE), sampling, self.timeout_s),
            Judge(self.judge),
            self.system,
            tuple(self.files or ()),
            self.session,
            self.model,
            self.json_schema,
            self.vote_on,
            Reasoning(self.reasoning) if self.reasoning else None,
            sampling,
            self.budget_tokens,
        )
