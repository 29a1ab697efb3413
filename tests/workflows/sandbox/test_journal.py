"""The journal: every value comes back as it was, replay asks nobody, and what does not give the same is told."""

import asyncio
import math
import random
from collections.abc import Mapping
from typing import Any

import pytest

from mlx_mcp.workflows.sandbox import journal as journals
from mlx_mcp.workflows.sandbox.journal import CannotReplay, Cell, Journal, Recording, asked, replay, tagged, untagged
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, ProgramError
from tests.effort import drawn


class Scripted:
    """A worker that makes the host calls that its code lists, and keeps what it got."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.inputs: dict[str, Any] = {}
        self.moments: list[float | None] = []
        self.output = ""
        self._calls: list[HostCall] = []
        self._end = Ended()

    async def run(self, code: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
        self.inputs |= inputs
        self.moments.append(moment)
        self._calls = [HostCall("llm_query", (word,)) for word in code.split() if word != "raise"]
        self._end = Ended(error=ProgramError("ValueError", "", 1, "")) if "raise" in code else Ended()
        self.output += f"ran {code}"
        return self._next()

    async def answer(self, value: Any) -> HostCall | Ended:
        self.got.append(value)
        return self._next()

    async def refuse(self, type: str, message: str) -> HostCall | Ended:
        self.got.append((type, message))
        return self._next()

    def _next(self) -> HostCall | Ended:
        return self._calls.pop(0) if self._calls else self._end

    async def dump(self) -> bytes:
        raise NotImplementedError

    async def load(self, dump: bytes) -> HostCall | None:
        raise NotImplementedError

    async def variables(self) -> dict[str, str]:
        return {}

    def take_output(self) -> str:
        output, self.output = self.output, ""
        return output

    async def close(self) -> None:
        pass


async def ran(worker: Scripted, journal: Journal, code: str, **inputs: Any) -> Journal:
    """The journal after a run, whose every second call is refused."""
    recording = Recording(code, inputs, 1.5)
    step = await worker.run(code, inputs, 1.5)
    while isinstance(step, HostCall):
        if len(recording.answers) % 2:
            recording.refused(step, "TimeoutError", "too late")
            step = await worker.refuse("TimeoutError", "too late")
        else:
            value = {"said": step.args[0], ("a", 1): (None, 2.5)}
            recording.answered(step, value)
            step = await worker.answer(value)
    recording.end = step
    return journal.with_cell(recording.ended(worker.take_output()))


def test_replay_gives_every_run_the_answers_that_it_got() -> None:
    async def main() -> None:
        worker, journal = Scripted(), Journal()
        for code, inputs in (("a b c", {"files": {"x": "1"}}), ("", {}), ("d raise", {"n": 2**70})):
            journal = await ran(worker, journal, code, **inputs)
        again = Scripted()
        await replay(Journal.from_bytes(journal.to_bytes(), journal.is_whole), again)
        assert (again.got, again.inputs, again.moments) == (worker.got, worker.inputs, worker.moments)
        assert again.take_output() == ""
        assert [cell.num_calls for cell in journal.cells()] == [3, 0, 1]
        assert [cell.failed for cell in journal.cells()] == ["", "", "ValueError"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("a c", "run 2 does not ask what it asked"),
        ("a", "run 2 does not ask what it asked"),
        ("a b c", "run 2 asks more than it asked"),
        ("a b raise", "run 2 does not end as it ended"),
    ],
)
def test_an_interpreter_that_does_something_else_is_told(code: str, why: str) -> None:
    class Changed(Scripted):
        async def run(self, said: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
            return await super().run(code if said == "a b" else said, inputs, moment)

    async def main() -> None:
        journal = Journal()
        for each in ("x", "a b"):
            journal = await ran(Scripted(), journal, each)
        with pytest.raises(CannotReplay, match=why):
            await replay(journal, Changed())

    asyncio.run(main())


def test_a_worker_that_is_spoiled_in_a_replay_is_told() -> None:
    class Spoiled(Scripted):
        async def run(self, code: str, inputs: Mapping[str, Any] = {}, moment: float | None = None) -> HostCall | Ended:
            return Ended(spoiled=True)

    async def main() -> None:
        with pytest.raises(CannotReplay, match="run 1 does not end"):
            await replay(Journal().with_cell(Cell("", 0.0)), Spoiled())

    asyncio.run(main())


def test_a_journal_that_grows_too_long_tells_its_runs_and_cannot_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_BYTES", 2000)
    monkeypatch.setattr(journals, "MAX_TOLD_BYTES", 800)
    journal = Journal().with_cell(Cell("one", 0.0, {"text": "x" * 1000}))
    assert journal.is_whole
    journal = journal.with_cell(Cell("two", 0.0, {"text": "x" * 1000}, num_calls=7))
    assert not journal.is_whole
    assert list(journal.cells()) == [Cell("one", 0.0), Cell("two", 0.0, num_calls=7)]
    for number in range(20):
        journal = journal.with_cell(Cell(f"next {number}", 0.0, {"text": "x"}))
        assert journal.nbytes <= 800
    assert [cell.code for cell in journal.cells()][-2:] == ["next 18", "next 19"]
    with pytest.raises(CannotReplay, match="inputs and answers"):
        asyncio.run(replay(journal, Scripted()))


def test_a_value_that_cannot_be_written_leaves_a_journal_that_says_so() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value in (object(), endless, {1: b""}):
        journal = Journal().with_cell(Cell("one", 0.0, {"value": value}))
        assert not journal.is_whole
        assert list(journal.cells()) == [Cell("one", 0.0)]


def test_a_fork_goes_on_apart_from_its_parents_journal() -> None:
    parent = Journal().with_cell(Cell("shared", 0.0))
    one, other = parent.with_cell(Cell("one", 0.0)), parent.with_cell(Cell("other", 0.0))
    assert [[cell.code for cell in each.cells()] for each in (parent, one, other)] == [
        ["shared"],
        ["shared", "one"],
        ["shared", "other"],
    ]


def test_of_the_output_the_beginning_is_kept() -> None:
    cell = Recording("print(x)", {}, 0.0).ended("y" * 10**6)
    assert cell.output == "y" * journals.MAX_OUTPUT_CHARS


def any_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 3 else 6)
    inner = [any_value(rng, depth + 1) for _ in range(rng.randrange(3))] if kind > 5 else []
    match kind:
        case 0:
            return rng.choice([None, True, False])
        case 1:
            return rng.choice([1, -1]) * rng.getrandbits(rng.choice([3, 60, 65, 10_000]))
        case 2:
            return rng.choice([0.1, -0.0, math.inf, -math.inf, rng.random()])
        case 3 | 4 | 5:
            return "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)])) for _ in range(4))
        case 6:
            return inner
        case 7:
            return tuple(inner)
    return {(key if not isinstance(key, list | dict) else str(key)): each for key, each in enumerate(inner)} | {
        (1, "a"): inner
    }


def test_every_value_comes_back_as_it_was() -> None:
    rng = random.Random(1)
    for _ in range(drawn(5000)):
        value = any_value(rng)
        [cell] = Journal().with_cell(Cell("", 0.0, {"value": value})).cells()
        assert repr(cell.inputs["value"]) == repr(value)
        assert untagged(tagged(value)) == value
    assert untagged(tagged(-(7**100_000))) == -(7**100_000)


def test_what_a_call_asks_is_told_by_all_that_was_given() -> None:
    calls = [
        HostCall("f", (1,)),
        HostCall("g", (1,)),
        HostCall("f", ([1],)),
        HostCall("f", ((1,),)),
        HostCall("f", (), {"a": 1}),
        HostCall("f", (1.0,)),
        HostCall("f", ("1",)),
    ]
    assert len({asked(call) for call in calls}) == len(calls)
    assert asked(HostCall("f", (1,), {"a": {"b": 2}})) == asked(HostCall("f", (1,), {"a": {"b": 2}}))
