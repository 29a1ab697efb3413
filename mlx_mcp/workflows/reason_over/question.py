"""What is asked, what it may cost, and what comes of it: values. Asks nobody."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mlx_mcp.errors import InvalidRequest
from mlx_mcp.workflows.asking import Budget
from mlx_mcp.workflows.counting import Counts

MAX_DEPTH = 2
MIN_SECONDS = 0.001


class Strategy(StrEnum):
    """How the input is worked through."""

    AUTO = "auto"  # the model writes programs if it can; else MAP_REDUCE, or SEARCH where there is very much
    MAP_REDUCE = "map_reduce"  # every part is read, and what was found is put together
    SEARCH = "search"  # the parts with the words that an answer would have are read
    FREE = "free"  # the model writes programs


class Stopped(StrEnum):
    """How a run ended."""

    SUBMITTED = "submitted"  # a program gave the answer
    EXTRACTED = "extracted"  # the model was asked for its best answer after it had to stop
    LIMIT = "limit"  # there is no answer


@dataclass(frozen=True)
class Question:
    """What is asked of the input in a sandbox, and what may be used for it.

    `turns` are the programs that a model may write. With `depth` 2 these may ask questions over texts of their own.
    """

    text: str
    schema: dict[str, Any] | None = None  # that the answer obeys
    strategy: Strategy = Strategy.AUTO
    model: str = ""
    budget: Budget = field(default_factory=Budget)
    turns: int = 20
    depth: int = 1


@dataclass(frozen=True)
class Step:
    """One program of a run: what it cost, and how it ended. Nothing that it printed is here."""

    calls: int
    printed_chars: int
    error: str = ""  # the kind of its exception


@dataclass(frozen=True)
class Answer:
    """What came of a question; `why` is why the run was stopped before an answer was submitted."""

    value: Any
    stopped: Stopped
    strategy: Strategy
    steps: tuple[Step, ...]
    why: str = ""


class Purse:
    """What is left of the budget of one run, whatever spends it."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self.counts = budget, Counts()
        self._deadline = asyncio.get_running_loop().time() + budget.seconds

    @property
    def left(self) -> Budget:
        """What may still be used."""
        seconds = self._deadline - asyncio.get_running_loop().time()
        return Budget(
            max(0, self._budget.calls - self.counts.calls),
            max(0, self._budget.tokens - self.counts.spent_tokens),
            max(MIN_SECONDS, seconds),
        )

    def spend(self, counts: Counts) -> None:
        """Take what was used."""
        self.counts += counts


def check(question: Question) -> None:
    """Check that a question can be asked.

    Raises:
        InvalidRequest: it cannot, with what to change.
    """
    if not question.text.strip():
        raise InvalidRequest("`question` is empty. Say in it what you want to know of the input.")
    if question.schema is not None:
        from jsonschema import Draft202012Validator, SchemaError  # only here: its import takes time at the start

        try:
            Draft202012Validator.check_schema(question.schema)
        except SchemaError as error:
            raise InvalidRequest(f"`json_schema` is not valid: {error.message[:200]}. Correct it.") from error


def fault_of(value: Any, schema: dict[str, Any] | None) -> str:
    """What of a submitted value does not obey the schema, in a sentence; "" if it does."""
    if schema is None:
        return "" if value not in (None, "") else "It is empty."
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    found = best_match(Draft202012Validator(schema).iter_errors(value))
    if found is None:
        return ""
    where = "".join(f"[{step!r}]" for step in found.absolute_path)
    return f"value{where}: {found.message[:300]}."
