"""What is pydantic-monty's own behind the port; `test_port.py` has what every interpreter does."""

import pytest

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox.monty import open_runtime
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits
from tests.workflows.sandbox.running import MOMENT, run, started

BRIEF = Limits(seconds=1)


async def test_a_value_that_is_too_large_is_told_of_and_a_call_with_one_fails(monkeypatch):
    monkeypatch.setattr("mlx_mcp.workflows.sandbox.values.MAX_VALUES", 1000)
    async with started() as worker:
        ended = await run(worker, "x = [0] * 1000\nx")
        assert "more than 1000 parts" in ended.value
        ended = await run(worker, "llm_query(x)")
        assert ended.error.type == "ValueError"
        assert "llm_query(): the value has more than" in ended.error.message
        shared = await run(worker, "y = [0]\nfor _ in range(60):\n    y = [y, y]\ny")
        assert "more than" in shared.value


async def test_a_program_that_needs_too_much_memory_is_ended():
    async with started(Limits(memory_bytes=64 << 20)) as worker:
        dump = await worker.dump()
        ended = await run(worker, "try:\n    x = [0] * 10 ** 9\nexcept MemoryError:\n    x = 1")
        assert (ended.error.type, ended.spoiled) == ("MemoryError", True)
        await worker.load(dump)
        assert (await run(worker, "x")).error.type == "NameError"


async def test_a_program_that_asks_for_the_clock_without_end_is_ended():
    async with started() as worker:
        ended = await run(worker, "import time\nwhile time.time() > 0: pass")
        assert ended.spoiled
        assert "looked too often" in ended.error.message


async def test_clock_and_random_numbers_depend_on_the_moment_alone():
    program = "import random, time, datetime\n(time.time(), random.random(), str(datetime.datetime.now()))"
    seen = []
    for moment in (MOMENT, MOMENT, MOMENT + 1):
        async with started() as worker:
            seen.append(await worker.run(program, moment=moment))
    assert seen[0] == seen[1] != seen[2]
    assert seen[0].value[0] == pytest.approx(MOMENT, abs=0.1)
    assert seen[0].value[2].startswith("2026-01-01")


async def test_a_dump_within_a_host_call_goes_on_from_there_as_often_as_one_likes():
    async with started() as worker:
        await worker.run("x = 1\ny = llm_query('q')\n\nx / y", moment=MOMENT)
        dump = await worker.dump()
        assert await worker.answer(2) == Ended(value=0.5)
        for answer in (4, 8):
            assert await worker.load(dump) == HostCall("llm_query", ("q",))
            assert await worker.answer(answer) == Ended(value=1 / answer)
        await worker.load(dump)
        ended = await worker.answer(0)
        assert (ended.error.type, ended.error.line) == ("ZeroDivisionError", 4)


async def test_a_run_adds_to_the_state_what_it_made_and_its_own_source_alone():
    async with started() as worker:
        sizes = []
        for _ in range(5):
            await run(worker, "n = max(map(int, ['1', '2']))")  # `map` is defined by the prelude
            assert (await worker.variables())["n"].startswith("int")
            sizes.append(len(await worker.dump()))
            await worker.load(await worker.dump())
    assert sizes[4] - sizes[1] < 3000, sizes


async def test_a_program_longer_or_deeper_than_is_read_is_refused_with_a_next_step():
    async with started() as worker:
        for program in ("x = '" + "a" * 50_000 + "'", "[" * 90 + "]" * 90, "-" * 30_000 + "1", "0x" + "f" * 9_000):
            ended = await run(worker, program)
            assert ended.error.type == "SyntaxError"
            assert ended.error.hint
            assert not ended.spoiled
        assert await run(worker, "1") == Ended(value=1)


async def test_newer_grammar_than_this_pythons_is_left_to_the_interpreter():
    async with started() as worker:
        assert await run(worker, "d = {'k': 1}\nf\"{'-'.join(['a', 'b'])} {d[\"k\"]}\"") == Ended(value="a-b 1")
        assert (await run(worker, 'f"{d["k"]}" x')).error.type == "SyntaxError"


async def test_what_is_missing_of_the_interpreter_is_told_with_a_command(monkeypatch, tmp_path):
    def missing(explicit=None):
        raise FileNotFoundError("could not locate the `monty` binary")

    monkeypatch.setattr("pydantic_monty._binary.find_monty_binary", missing)
    with pytest.raises(SandboxFailed, match=r"which is not installed whole. Run: pip install --force-reinstall"):
        await open_runtime(tmp_path)


async def test_helpers_and_modules_of_the_sandbox_refuse_what_they_cannot_do():
    told = {
        "chunks('abc', 0)": "needs a size of 1 or more, and a smaller overlap",
        "import statistics\nstatistics.mean([])": "statistics needs at least one value",
        "import statistics\nstatistics.stdev([1])": "statistics.variance needs at least two values",
        "from enum import Enum\nclass C(Enum):\n    A = 1\nC(2)": "2 is not a valid C",
    }
    async with started() as worker:
        for program, message in told.items():
            ended = await run(worker, program)
            assert (ended.error.type, message in ended.error.message) == ("ValueError", True), ended.error


async def test_a_program_that_asks_again_and_again_with_too_large_values_is_ended(monkeypatch):
    monkeypatch.setattr("mlx_mcp.workflows.sandbox.values.MAX_VALUES", 1000)
    async with started() as worker:
        program = "while True:\n    try: llm_query([0] * 1000)\n    except ValueError: pass"
        ended = await run(worker, program)
        assert ended.spoiled
        assert "asked too often with values that are too large" in ended.error.message


async def test_a_program_that_replaces_what_variables_are_shown_by_shows_none_and_prints_nothing_here(capfd):
    async with started(BRIEF) as worker:
        await run(worker, "x = 'a'\ndef len(x):\n    print('from len')\n    return 1")
        await worker.variables()
        await run(worker, "def len(x):\n    while True: pass")
        assert await worker.variables() == {}
    assert "from len" not in capfd.readouterr().out
