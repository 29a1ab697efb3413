"""A scripted model that writes programs, over a scripted interpreter: every way in which a run goes and ends."""

import asyncio
import json
from dataclasses import replace

import pytest

from mlx_mcp.errors import BudgetSpent, CapacityError, InvalidRequest, PromptTooLong
from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service, known_sessions
from mlx_mcp.workflows.asking import Budget
from mlx_mcp.workflows.reason_over import trial
from mlx_mcp.workflows.reason_over.question import Purse, Question, Stopped, Strategy
from mlx_mcp.workflows.reason_over.reason_over import reason_over
from mlx_mcp.workflows.reason_over.replies import read
from mlx_mcp.workflows.reason_over.trial import PROBE_SUM, key_of
from mlx_mcp.workflows.sandbox.runtime import HostCall
from mlx_mcp.workflows.sandbox.runtime import Limits as ProgramLimits
from mlx_mcp.workflows.sandbox.sandbox import Program
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes
from tests.fakes import FakeLoader, fake_client
from tests.service.house import CALLER, requests_of, unheard
from tests.workflows.fakes import FakeRuntime

SUM = Question("What is the sum?", {"type": "integer"}, Strategy.FREE)


def writes(code, plan="I go on."):
    """A reply that runs the program of that name."""
    return f"{plan}\n```python\n{code}\n```"


class House:
    """A service whose model says what `script` has for the last thing that it was told, and sandboxes of fakes."""

    def __init__(self, script, programs, context_tokens=20_000):
        self.script, self.heard = script, []
        loader = FakeLoader(context_tokens=context_tokens)
        loader.runner.says = self.says
        self.service = Service(fake_client(loader, block_tokens=16), Registry(None))
        self.runtime = FakeRuntime({f"{name}\n": program for name, program in programs.items()})
        self.runtime.programs["None"] = nothing

        async def open_runtime():
            return self.runtime

        self.sandboxes = Sandboxes(open_runtime)

    def says(self, text):
        latest = max(self.script, key=text.rfind, default="")
        if latest not in text:  # a context, to which nothing is said
            return "?"
        if not self.heard or self.heard[-1] != text:
            self.heard.append(text)
        return self.script[latest]

    async def ask(self, question, report=unheard, **inputs):
        sandbox = await self.sandboxes.create(self.service, CALLER)
        return await reason_over(self.service, CALLER, self.sandboxes, sandbox, question, report)


@pytest.fixture
def house():
    houses = []

    def make(*given, **options):
        houses.append(House(*given, **options))
        return houses[-1]

    yield make
    for each in houses:
        assert not [info for info in known_sessions(each.service).values() if info.name.startswith("reason")]
        assert each.service.engine.close()


def nothing(v, say):
    return None
    yield


def looks(v, say):
    say("3 lines: 1, 2, 3")
    v["numbers"] = [1, 2, 3]
    return None
    yield


def breaks(v, say):
    raise KeyError("numbers")
    yield


def submits(value):
    def program(v, say):
        yield HostCall("submit", (value,))

    return program


async def test_a_model_looks_fails_is_told_how_and_submits(house):
    script = {
        "Begin.": writes("look"),
        "Program 1 of 20.": writes("wrong"),
        "Program 2 of 20.": writes("right"),
    }
    house = house(script, {"look": looks, "wrong": breaks, "right": submits(6)})
    made = await house.ask(SUM)
    assert (made.answer.value, made.answer.stopped, made.answer.why) == (6, Stopped.SUBMITTED, "")
    assert [step.error for step in made.answer.steps] == ["", "KeyError", ""]
    first, second, third = house.heard
    assert "The question: What is the sum?\nSubmit a value that obeys this JSON schema" in first
    assert "3 lines: 1, 2, 3\nNew or changed variables:\nnumbers: list\nProgram 1 of 20." in second
    assert "The program failed in line 1: KeyError: 'numbers'" in third


async def test_a_turn_computes_what_is_new_in_it_alone(house, monkeypatch):
    house = house({"Begin.": writes("look"), "Program 1 of 20.": writes("right")}, {"look": looks, "right": submits(6)})
    made = await house.ask(SUM)
    begin, turn = (text.rpartition("|")[2] if "|" in text else text for text in house.heard)
    assert made.counts.computed_tokens <= len(begin) + len(turn) + 2 * 16
    assert made.counts.calls == 3


async def test_the_hint_of_an_error_reaches_the_model(house):
    house = house(
        {"Begin.": writes("none"), "Program 1 of 20.": writes("right")},
        {"right": submits(1)},
    )
    assert (await house.ask(SUM)).answer.value == 1
    assert "SyntaxError: no program 'none\\n'\nHint: Write another." in house.heard[1]


async def test_a_program_that_prints_nothing_is_told_so_with_what_it_ended_in(house):
    def ends_in(v, say):
        return [1, 2]
        yield

    script = {"Begin.": writes("silent"), "Program 1 of 20.": writes("ends"), "Program 2 of 20.": writes("right")}
    house = house(script, {"silent": nothing, "ends": ends_in, "right": submits(1)})
    await house.ask(SUM)
    assert "(Nothing was printed. Print what you want to see.)" in house.heard[1]
    assert "(Nothing was printed. It ended in: [1, 2])" in house.heard[2]


async def test_a_value_that_does_not_obey_the_schema_is_not_taken(house):
    script = {"Begin.": writes("text"), "Program 1 of 20.": writes("right")}
    house = house(script, {"text": submits("six"), "right": submits(6)})
    made = await house.ask(SUM)
    assert (made.answer.value, len(made.answer.steps)) == (6, 2)
    assert "What was submitted was not taken. value: 'six' is not of type 'integer'. Submit another" in house.heard[1]


async def test_a_model_that_never_submits_is_asked_for_its_best_answer(house, monkeypatch):
    script = {f"Program {n} of 3.": writes(f"look{n}") for n in (1, 2)}
    script |= {"Begin.": writes("look0"), "You can run no more programs": "5"}
    house = house(script, {f"look{n}": looks for n in range(3)})
    got = requests_of(house.service, monkeypatch)
    made = await house.ask(replace(SUM, turns=3))
    assert (made.answer.value, made.answer.stopped) == (5, Stopped.EXTRACTED)
    assert made.answer.why == "3 programs were run, as many as there may be"
    assert got[-1].grammar.source == json.dumps(SUM.schema)
    assert [request.keep for request in got[-2:]] == [True, False]


async def test_a_program_that_comes_twice_ends_the_run(house):
    house = house(
        {"Begin.": writes("look"), "Program 1 of 20.": writes("look  "), "You can run no": "7"}, {"look": looks}
    )
    made = await house.ask(SUM)
    assert (made.answer.stopped, made.answer.why) == (Stopped.EXTRACTED, "the model wrote the same program twice")
    assert len(made.answer.steps) == 1


async def test_three_failures_in_a_row_end_the_run(house):
    script = {
        "Begin.": "I will think about it.",
        "had no block of code": writes("a"),
        "Program 2 of 20.": writes("b"),
        "You can run no": "8",
    }
    house = house(script, {"a": breaks, "b": breaks})
    made = await house.ask(SUM)
    assert made.answer.why == "3 programs in a row failed"
    assert [step.error for step in made.answer.steps] == ["no program", "KeyError", "KeyError"]
    assert made.answer.value == 8


async def test_a_reply_that_is_cut_off_runs_nothing(house):
    script = {"Begin.": writes("x" * 9000), "was cut off, so nothing ran": writes("right")}
    house = house(script, {"right": submits(2)})
    assert (await house.ask(SUM)).answer.value == 2


async def test_the_budget_ends_the_run_and_leaves_one_question_for_the_answer(house):
    script = {f"Program {n} of 20.": writes(f"look{n}") for n in range(1, 9)}
    house = house(script | {"Begin.": writes("look0"), "You can run no": "9"}, {f"look{n}": looks for n in range(9)})
    made = await house.ask(replace(SUM, budget=Budget(calls=4)))
    assert (made.answer.value, made.answer.stopped) == (9, Stopped.EXTRACTED)
    assert made.answer.why.startswith("its budget is used up (These are 1 calls, and this run may make 0 more")
    assert made.counts.calls == 5
    with pytest.raises(BudgetSpent):
        await house.ask(replace(SUM, budget=Budget(calls=0)))


async def test_no_answer_at_all_is_a_limit(house):
    house = house({"Begin.": writes("look"), "Program 1 of 1.": "", "You can run no": "I do not know"}, {"look": looks})
    made = await house.ask(replace(SUM, turns=1))
    assert (made.answer.value, made.answer.stopped) == (None, Stopped.LIMIT)
    assert "nor was there an answer then" in made.answer.why


async def test_a_conversation_that_is_full_begins_again_with_the_variables(house):
    def talks(v, say):
        v["seen"] = v.get("seen", 0) + 1
        say("y" * 3900)
        return None
        yield

    script = {f"Program {n} of 20.": writes(f"talk{n}") for n in range(1, 4)}
    script |= {"Begin.": writes("talk0"), "Program 4 of 20.": writes("right")}
    house = house(script, {"right": submits(4)} | {f"talk{n}": talks for n in range(4)}, context_tokens=12_000)
    made = await house.ask(SUM)
    assert (made.answer.value, made.answer.stopped) == (4, Stopped.SUBMITTED)
    again = [text for text in house.heard if "programs already. What was said meanwhile is gone" in text]
    assert len(again) == 1
    assert "seen: int" in again[0]


async def test_a_program_may_ask_a_question_two_levels_deep_and_no_deeper(house):
    def asks(v, say):
        v["deep"] = yield HostCall("rlm_query", ("How much is in it?", "17 apples"))

    def tells(v, say):
        yield HostCall("submit", (v["context"],))

    def deeper(v, say):
        try:
            yield HostCall("rlm_query", ("And?", "more"))
        except NameError as error:
            v["refused"] = str(error)

    def gives(v, say):
        yield HostCall("submit", (len(v["deep"]),))

    script = {
        "Begin.": writes("ask"),
        "Program 1 of 10.": writes("tell"),
        "Program 1 of 20.": writes("give"),
    }
    house = house(script, {"ask": asks, "tell": tells, "deeper": deeper, "give": gives})
    of_child = writes("deeper")
    for_real = house.says
    house.service.engine.loader.runner.says = lambda text: (
        of_child if "How much is in it?" in text and "|" not in text else for_real(text)
    )
    made = await house.ask(replace(SUM, depth=2))
    assert (made.answer.value, made.answer.stopped) == (len("17 apples"), Stopped.SUBMITTED)
    assert made.counts.calls == 6, "the contexts of both, and two turns of each"
    assert house.sandboxes.num == 1, "the child's sandbox is closed"


async def test_a_cancelled_run_leaves_no_session_and_no_row(house):
    house = house({"Begin.": writes("look"), "Program 1 of 20.": "endless " * 180}, {"look": looks})
    call = asyncio.create_task(house.ask(SUM))
    async with asyncio.timeout(30):
        while len(house.heard) < 2:
            await asyncio.sleep(0.001)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(30):
        while house.service.engine.stats.rows:
            await asyncio.sleep(0.001)
    assert not known_sessions(house.service)


async def test_auto_tries_a_model_once_and_has_those_work_freely_that_can(house):
    def sums(v, say):
        yield HostCall("submit", (sum(n for n in map(int, v["context"].split()) if n > 20),))

    house = house({"Begin.": writes("sum")}, {"sum": sums})
    asked = replace(SUM, strategy=Strategy.AUTO)
    sandbox = await house.sandboxes.create(house.service, CALLER)

    async def ask(text):
        inputs = Program("None", {"context": text})
        await house.sandboxes.run(house.service, CALLER, sandbox, inputs, ProgramLimits(), Budget(), unheard)
        return await reason_over(house.service, CALLER, house.sandboxes, sandbox, asked, unheard)

    made = await ask("30\n31")
    assert (made.answer.value, made.answer.strategy) == (61, Strategy.FREE)
    assert house.sandboxes.trials.known(key_of(house.service, "")) is True
    assert made.counts.calls == 4, "the trial's are among them"
    assert (await ask("40\n41")).counts.calls == 2
    assert str(PROBE_SUM) not in house.heard[0]


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (PromptTooLong(30, 1, 20), False),
        (CapacityError("The queue is full.", 1.0), None),
        (BudgetSpent("The run has made 8 calls."), None),
    ],
)
async def test_a_trial_that_failed_for_want_of_room_or_time_says_nothing_of_the_model(house, monkeypatch, error, known):
    async def fails(*given):
        raise error

    house = house({}, {})
    monkeypatch.setattr(trial, "fill", fails)
    sandboxes, purse = house.sandboxes, Purse(Budget())
    assert await trial.writes_programs(house.service, CALLER, sandboxes, "", 20_000, purse) is False
    assert sandboxes.trials.known(key_of(house.service, "")) is known
    assert sandboxes.num == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": " "}, "`question` is empty. Say in it"),
        ({"schema": {"type": "nothing"}}, "`json_schema` is not valid"),
    ],
)
async def test_what_cannot_be_asked_is_refused(house, change, says):
    with pytest.raises(InvalidRequest, match=says):
        await house({}, {}).ask(replace(SUM, **change))


def test_a_reply_is_read_with_or_without_a_language_and_backticks_within_lines():
    assert read("I look.\n```python\nprint('```')\nx = 1\n```").code == "print('```')\nx = 1\n"
    assert read("```\ny\n```\nand more").plan == ""
    assert read("I look.\n```python\nprint(1)") is None
