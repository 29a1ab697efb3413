"""How one answer comes of many: votes, and what a model that judges is asked. Asks nobody itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mcp.workflows.deliberate.task import Task

MERGE = (
    "Write the one best answer out of these. Keep what they agree on, settle where they differ by what is known, and "
    "leave out nothing that matters. The reader sees your answer alone, so do not speak of these answers."
)
MERGE_PARTS = (
    "Each answers a part of the task. Write one answer to the whole task out of these. Settle where they differ by "
    "what is known, and leave out nothing that matters. The reader sees your answer alone, so do not speak of these "
    "answers."
)
PICK = "Choose the best of these answers: the one that is right, whole and clear. Say why in a sentence, then choose."
SPLIT = (
    "Do not do this yet. Break it into {} questions that can be answered without knowing the answers to the others, "
    "and that together are all of it."
)
MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class Tally:
    """How a vote stands: `counts` are the values with their votes, the most first; of equal ones the first given."""

    field: str
    counts: tuple[tuple[Any, int], ...]

    @property
    def votes(self) -> int:
        """The votes for the first value."""
        return self.counts[0][1] if self.counts else 0

    @property
    def of(self) -> int:
        """All votes."""
        return sum(votes for _, votes in self.counts)

    @property
    def tied(self) -> bool:
        """Whether another value has as many votes as the first."""
        return len(self.counts) > 1 and self.counts[1][1] == self.votes

    def is_certain(self, num_open: int) -> bool:
        """Whether no other value can come to as many votes as the first, with so many votes still open."""
        second = self.counts[1][1] if len(self.counts) > 1 else 0
        return self.votes > second + num_open


def tally_of(field: str, values: Sequence[Any]) -> Tally:
    """The votes for each of the values, in the order of the branches that gave them."""
    counted: dict[str, tuple[Any, int]] = {}
    for value in values:
        first, votes = counted.get(key_of(value), (value, 0))
        counted[key_of(value)] = first, votes + 1
    return Tally(field, tuple(sorted(counted.values(), key=lambda each: -each[1])))


def key_of(value: Any) -> str:
    """What is equal for two values that are one vote: case and space around a text do not count, nor does 1 or 1.0."""
    if isinstance(value, str):
        value = value.strip().casefold()
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def value_of(text: str, field: str) -> tuple[Any, ...]:
    """The value of a property of an answer in JSON; empty if it has none, as where it was cut off."""
    try:
        answer = json.loads(text)
    except ValueError:
        return ()
    return (answer[field],) if isinstance(answer, dict) and field in answer else ()


def asked_of(task: str, role: str) -> str:
    """What a branch is asked: what it shares with the others comes first, so that it is computed once."""
    return f"{task}\n\n{role}" if role else task


def asked_to_split(task: str, num: int) -> tuple[str, dict[str, Any]]:
    """What the model is asked before the branches of a split, and the schema of its answer."""
    questions = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": num}
    return f"{task}\n\n{SPLIT.format(num)}", object_of(questions=questions)


def asked_to_pick(task: str, answers: Sequence[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
    """What a judge that picks is asked, given roles and answers, and the schema of its choice, counted from 1."""
    choice = {"type": "integer", "minimum": 1, "maximum": len(answers)}
    schema = object_of(reason={"type": "string", "maxLength": MAX_REASON_CHARS}, choice=choice)
    return f"{task}\n\n{listed(answers)}\n\n{PICK}", schema


def asked_to_merge(task: Task, answers: Sequence[tuple[str, str]], tally: Tally | None, parts: bool) -> str:
    """What a judge that merges is asked, given roles and answers; what most of them say is what it holds to."""
    anchor = ""
    if tally is not None and tally.votes > 1 and not tally.tied:
        value = json.dumps(tally.counts[0][0], ensure_ascii=False)
        anchor = (
            f"\n\nFor `{tally.field}`, {tally.votes} of {tally.of} say {value}. Depart from that only where the "
            "answers show that it is wrong."
        )
    return f"{task.task}\n\n{listed(answers)}{anchor}\n\n{MERGE_PARTS if parts else MERGE}"


def listed(answers: Sequence[tuple[str, str]]) -> str:
    """The answers, whole, with their numbers and roles."""
    shown = [
        f'<answer number="{number}"{f" of={json.dumps(role, ensure_ascii=False)}" if role else ""}>\n{text}\n</answer>'
        for number, (role, text) in enumerate(answers, 1)
    ]
    return "\n\n".join((f"{len(answers)} answers were written to this, none of which knew the others:", *shown))


def object_of(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has these properties and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
