"""The programs of ours, and a scripted model's, in the real interpreter."""

import json
from dataclasses import replace
from functools import partial

import pytest

from mlx_mcp.models.registry import Registry
from mlx_mcp.service.service import Service
from mlx_mcp.workflows.asking import Budget
from mlx_mcp.workflows.reason_over.input import fill
from mlx_mcp.workflows.reason_over.question import Question, Stopped, Strategy
from mlx_mcp.workflows.reason_over.reason_over import reason_over
from mlx_mcp.workflows.sandbox.monty import open_runtime
from mlx_mcp.workflows.sandbox.sandboxes import Sandboxes
from tests.fakes import FakeLoader, fake_client
from tests.service.house import CALLER, unheard

QUESTION = Question("Who has the red key?", {"type": "object", "properties": {"who": {"type": "string"}}})
LINES = [f"{1000 + n} nothing of note in room {n}" for n in range(130)]
LINES[77] = "1077 the red key was given to Orla"


@pytest.fixture
async def house(tmp_path):
    loader = FakeLoader()
    service = Service(fake_client(loader, block_tokens=16), Registry(None))
    sandboxes = Sandboxes(partial(open_runtime, tmp_path))

    async def ask(question, says, context_tokens=1_200, **inputs):
        loader.runner.says, loader.context_tokens = says, context_tokens
        sandbox = await sandboxes.create(service, CALLER)
        await fill(service, CALLER, sandboxes, sandbox, inputs)
        return await reason_over(service, CALLER, sandboxes, sandbox, question, unheard)

    yield ask
    await sandboxes.end()
    assert service.engine.close()


def reader(text):
    """A model that reads what it is given, and answers as it is asked to."""
    if "one part of a long input" in text:
        found = "red key" in text.partition("as they stand there")[2]
        return json.dumps({"relevant": found, "notes": "Orla has the red key." if found else ""})
    if "Which words or short names" in text:
        return json.dumps({"words": ["Red Key", "given"]})
    return json.dumps({"who": "Orla" if "Orla" in text else "nobody"})


@pytest.mark.parametrize("strategy", [Strategy.MAP_REDUCE, Strategy.SEARCH])
@pytest.mark.parametrize("as_files", [True, False])
async def test_our_programs_find_what_one_line_of_a_long_input_says(house, strategy, as_files):
    text = "\n".join(LINES)
    inputs = {"files": {"a.log": text[:2000], "b.log": text[2000:]}} if as_files else {"context": text}
    made = await house(replaced(strategy), reader, **inputs)
    assert (made.answer.value, made.answer.stopped) == ({"who": "Orla"}, Stopped.SUBMITTED)
    assert made.counts.calls == (2 if strategy is Strategy.SEARCH else made.counts.calls)


async def test_input_of_one_part_is_read_at_once(house):
    made = await house(replaced(Strategy.MAP_REDUCE), reader, context="Orla has it.")
    assert (made.answer.value, made.counts.calls) == ({"who": "Orla"}, 1)


async def test_notes_that_are_too_many_are_put_together_first(house):
    def says(text):
        if "one part of a long input" in text:
            return json.dumps({"relevant": True, "notes": "n" * 200})
        return "short" if "in fewer words" in text else json.dumps({"who": text[-300:]})

    made = await house(replaced(Strategy.MAP_REDUCE), says, context="\n".join(LINES))
    assert "short" in made.answer.value["who"]
    assert "nnn" not in made.answer.value["who"]


async def test_parts_that_are_too_long_for_a_model_are_halved_and_what_stays_unread_is_told(house):
    whole = await house(replaced(Strategy.MAP_REDUCE), dense, context="\n".join(LINES))
    assert (whole.answer.value, whole.answer.why) == ({"who": "Orla"}, "")
    broken = "\n".join(LINES) + " broken" * 100
    partly = await house(replaced(Strategy.MAP_REDUCE), dense, context=broken)
    assert partly.answer.value == {"who": "Orla"}
    assert partly.answer.why.startswith("the answer leaves out")
    assert "is no JSON" in partly.answer.why


def dense(text):
    """A model that gives no whole answer to a part of more than 500 characters, or to one that is broken."""
    part = text.partition("as they stand there")[2]
    return '{"relevant": tr' + "u" * 600 if len(part) > 500 or "broken broken" in part else reader(text)


async def test_a_sandbox_without_input_and_a_budget_that_is_too_small_are_told(house):
    empty = await house(replaced(Strategy.SEARCH), reader, other=1)
    assert (empty.answer.value, empty.answer.stopped) == (None, Stopped.LIMIT)
    assert "There is neither `files` nor `context` to work through: give files" in empty.answer.why
    spent = await house(replaced(Strategy.MAP_REDUCE, Budget(calls=2)), reader, context="\n".join(LINES))
    assert "run again with a larger max_calls" in spent.answer.why


async def test_auto_takes_our_programs_for_a_model_that_cannot_write_any(house):
    made = await house(replaced(Strategy.AUTO), reader, context="\n".join(LINES))
    assert (made.answer.strategy, made.answer.value) == (Strategy.MAP_REDUCE, {"who": "Orla"})


async def test_a_model_that_writes_programs_sees_real_errors_and_hints(house):
    """Bad code, a hint, fixed, submitted: in the interpreter that there is."""
    script = {
        "Begin. Reply": "I look.\n```python\nlines = context.split('\\n')\nprint(len(lines), rows[0])\n```",
        "NameError": "I mistyped.\n```python\nhit = [each for each in lines if 'red key' in each]\nprint(hit)\n```",
        "given to Orla": "That is it.\n```python\nsubmit({'who': hit[0].split()[-1]})\n```",
    }
    made = await house(
        replaced(Strategy.FREE), lambda text: script[max(script, key=text.rfind)], 4_000, context="\n".join(LINES)
    )
    assert (made.answer.value, made.answer.stopped) == ({"who": "Orla"}, Stopped.SUBMITTED)
    assert [step.error for step in made.answer.steps] == ["NameError", "", ""]


async def test_a_program_asks_a_question_over_a_text_of_its_own(house):
    """Two levels deep, each in a worker of its own; the inner one has no such function."""
    outer = "\n".join(
        [
            "part = context.split('\\n')[70:80]",
            "found = rlm_query('Which line?', '\\n'.join(part))",
            "submit({'who': found})",
        ]
    )
    inner = "\n".join(
        [
            "try:",
            "    rlm_query('x', 'y')",
            "except NameError as error:",
            "    submit(context.split('\\n')[7])",
        ]
    )

    def says(text):
        code = inner if "The question: Which line?" in text else outer
        return f"I go.\n```python\n{code}\n```"

    asked = replace(replaced(Strategy.FREE), depth=2)
    made = await house(asked, says, 4_000, context="\n".join(LINES))
    assert (made.answer.value, made.answer.stopped) == ({"who": LINES[77]}, Stopped.SUBMITTED)
    assert made.counts.calls == 4


def replaced(strategy, budget=None):
    return Question(QUESTION.text, QUESTION.schema, strategy, budget=budget or Budget())
