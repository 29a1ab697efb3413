"""What several branches are asked, and how one answer comes of theirs: values, and what of them cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from mlx_mcp.chat.prompt import Reasoning
from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.batch import MAX_BRANCHES, nth_seed
from mlx_mcp.service.values import Sampling

ALIKE_TEMPERATURE = 0.8  # of branches that nothing else tells apart
TTL_S = 3600.0  # how long the sessions of branches are kept without use, where no session of the caller's says it


class Judge(StrEnum):
    """How one answer comes of many."""

    VOTE = "vote"  # the value of a field that most branches give
    MERGE = "merge"  # the model writes one answer out of all
    PICK = "pick"  # the model chooses one of them
    SPLIT = "split"  # the model first writes a question for each branch; then as MERGE


@dataclass(frozen=True)
class Branch:
    """One of those that are asked; what is left open is as the whole task says it."""

    role: str = ""  # comes after the task
    model: str = ""
    temperature: float | None = None
    seed: int | None = None
    timeout_s: float | None = None


@dataclass(frozen=True)
class Task:
    """What is asked, of whom, over which context.

    The context is a `session`, or `system` and `files`; it is computed once. `schema` is a JSON schema that all answers
    obey, and `vote_on` the property of it that is counted. `sampling.max_tokens` holds for each answer, `budget_tokens`
    for all that are written, the judge's included.
    """

    task: str
    branches: tuple[Branch, ...]
    judge: Judge = Judge.MERGE
    system: str = ""
    files: tuple[str, ...] = ()
    session: str = ""
    model: str = ""
    schema: dict[str, Any] | None = None
    vote_on: str = ""
    reasoning: Reasoning | None = None
    sampling: Sampling = field(default_factory=Sampling)
    budget_tokens: int | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models that answer, the judge's first where there is a judge."""
        judges = () if self.judge is Judge.VOTE else (self.model,)
        return tuple(dict.fromkeys((*judges, *(branch.model or self.model for branch in self.branches))))


def check(task: Task) -> Task:
    """The task, with the field named that is voted on, if there is one.

    Raises:
        InvalidRequest: it cannot be carried out so; the text says how it can.
    """
    if not task.task.strip():
        raise InvalidRequest("`task` is empty. Say in it what all branches should do.")
    if not 2 <= len(task.branches) <= MAX_BRANCHES:
        raise InvalidRequest(
            f"There are {len(task.branches)} branches; there must be from 2 to {MAX_BRANCHES}. Change `branches` or "
            "`n`; for one answer use generate."
        )
    if task.session and (task.system or task.files):
        raise InvalidRequest("The context is the `session`, or `system` and `files`: leave one of the two out.")
    if task.session and any(task.models):
        raise InvalidRequest("A `session` has a model of its own: name no other, or give `files` instead of a session.")
    return replace(task, vote_on=voted_field(task))


def voted_field(task: Task) -> str:
    """The property of the answers that is counted; "" if there is none.

    Raises:
        InvalidRequest: there is a vote, and it is not clear on what.
    """
    names = list((task.schema or {}).get("properties") or ())
    if task.vote_on and task.vote_on not in names:
        shown = ", ".join(names) or "none"
        raise InvalidRequest(f"`vote_on` must be a property of `json_schema`, which has: {shown}.")
    if task.vote_on or task.judge is not Judge.VOTE:
        return task.vote_on or (names[0] if len(names) == 1 else "")
    if not names:
        raise InvalidRequest(
            'A vote counts a property of the answers: give `json_schema`, such as {"type": "object", "properties": '
            '{"answer": {"enum": ["yes", "no"]}}, "required": ["answer"]}, or another `judge`.'
        )
    if len(names) > 1:
        raise InvalidRequest(f"`vote_on` must be given: the property that is counted, one of {', '.join(names)}.")
    return str(names[0])


def branches_of(given: Sequence[Branch], n: int, sampling: Sampling, timeout_s: float | None) -> tuple[Branch, ...]:
    """`n` of each given branch, or of one without a role, each with its own way of drawing and its deadline.

    Where a seed is given it counts up. Branches that nothing else tells apart are drawn at ALIKE_TEMPERATURE.

    Raises:
        InvalidRequest: they would all write the same.
    """
    made = [each for branch in given or (Branch(),) for each in [branch] * n]
    first = {(branch.role, branch.model): branch for branch in made}
    alike = len(first) < len(made)
    branches = []
    for index, branch in enumerate(made):
        temperature = sampling.temperature if branch.temperature is None else branch.temperature
        if temperature is None and alike:
            temperature = ALIKE_TEMPERATURE
        if alike and temperature == 0:
            raise InvalidRequest(
                "At temperature 0 branches of the same role and model write the same. Give a temperature, say 0.8, or "
                "each its own role."
            )
        seed = nth_seed(sampling.seed, index) if branch.seed is None else branch.seed
        timeout = timeout_s if branch.timeout_s is None else branch.timeout_s
        branches.append(replace(branch, temperature=temperature, seed=seed, timeout_s=timeout))
    return tuple(branches)
