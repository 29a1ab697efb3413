"""The port to what runs programs, by every interpreter: programs, host calls, limits, dumps, and ends at any time."""

import asyncio
import json
import os
import subprocess
import sys

import pytest

from mlx_mcp.errors import SandboxFailed
from mlx_mcp.workflows.sandbox.runtime import Ended, HostCall, Limits
from tests.process.windows import is_alive, wait_until
from tests.workflows.sandbox.running import encloses_cpython, pid_of, run, runtime, started

BRIEF = Limits(seconds=1)


@pytest.fixture(params=["monty", "cpython"])
def python(request):
    """Which interpreter runs the programs."""
    if request.param == "cpython" and not encloses_cpython():
        pytest.skip("nothing encloses CPython here")
    return request.param


async def test_variables_stay_between_runs_and_inputs_become_variables(python):
    async with started(python=python) as worker:
        assert await run(worker, "x = y + 1", {"y": 2}) == Ended()
        assert await run(worker, "x, y") == Ended(value=(3, 2))
        assert await run(worker, "", {"z": [1]}) == Ended()
        assert await run(worker, "z") == Ended(value=[1])


async def test_a_host_call_waits_for_its_answer_and_the_program_goes_on_with_it(python):
    async with started(python=python) as worker:
        assert await worker.run("a = llm_query('q', schema={'x': 1})\na * 2") == HostCall(
            "llm_query", ("q",), {"schema": {"x": 1}}
        )
        assert await worker.answer("ab") == Ended(value="abab")


async def test_a_refused_call_raises_in_the_program(python):
    async with started(python=python) as worker:
        await worker.run("try:\n    llm_query('q')\nexcept TimeoutError as e:\n    got = str(e)\ngot")
        assert await worker.refuse("TimeoutError", "too late") == Ended(value="too late")
        await worker.run("llm_query('q')")
        ended = await worker.refuse("Unheard", "of")
        assert (ended.error.type, ended.error.message, ended.error.line) == ("RuntimeError", "Unheard: of", 1)


async def test_system_exit_ends_a_run_without_an_error_and_what_it_did_stays(python):
    async with started(python=python) as worker:
        await worker.run("x = 1\ntry:\n    submit(2)\nexcept Exception:\n    x = 3\nx = 4")
        assert await worker.refuse("SystemExit", "") == Ended()
        assert await run(worker, "x") == Ended(value=1)


async def test_host_functions_can_be_passed_on_and_others_are_not_defined(python):
    async with started(python=python) as worker:
        assert await run(worker, "def ask(f): return f('ab')\nask(llm_query)") == Ended(value="no 2")
        ended = await run(worker, "x = 1\nunheard_of(3)")
        assert (ended.error.type, ended.error.line) == ("NameError", 2)
        assert "Define unheard_of first" in ended.error.hint


async def test_output_is_taken_once_and_waits_for_whoever_takes_it(python):
    async with started(python=python) as worker:
        await worker.run("print('a')\nllm_query('q')\nprint('b')")
        assert worker.take_output() == "a\n"
        await worker.answer("x")
        await run(worker, "print('c')")
        assert worker.take_output() == "b\nc\n"
        assert worker.take_output() == ""


async def test_values_that_json_does_not_have_become_lists_texts_and_dicts(python):
    async with started(python=python) as worker:
        program = (
            "from datetime import date\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
            "({2}, date(2026, 1, 2), A(1), b'ab', 10 ** 6000, {(1, 'a'): 2})"
        )
        ended = await run(worker, program)
        assert ended.value == ([2], "2026-01-02", {"x": 1}, "ab", "an integer of 19932 bits", {"(1, 'a')": 2})


async def test_errors_tell_the_line_of_the_program_as_it_was_sent(python):
    program = (
        "def f(xs):\n    del xs[0]\n    return next(\n        x\n        for x in xs\n        if 1 / x\n    )\n\n\n"
    )
    async with started(python=python) as worker:
        assert await run(worker, program) == Ended()
        ended = await run(worker, "y = 1\n\n\nf([0, 0])")
        assert (ended.error.type, ended.error.line) == ("ZeroDivisionError", 4)
        ended = await run(worker, program + "f([0, 0])")
        assert 3 <= ended.error.line <= 6
        assert (await run(worker, "x = 1\nx x")).error.line == 2


@pytest.mark.parametrize("program", ["while True: pass", "try:\n    while True: pass\nexcept BaseException: x = 2"])
async def test_a_program_that_takes_too_long_is_ended_and_the_last_dump_is_as_before(python, program):
    async with started(BRIEF, python=python) as worker:
        await run(worker, "x = 1")
        dump = await worker.dump()
        ended = await run(worker, program)
        assert (ended.error.type, ended.spoiled) == ("TimeoutError", True)
        assert "Do less in one run" in ended.error.hint
        assert (await run(worker, "x")).spoiled  # nothing runs on such a heap
        assert await worker.load(dump) is None
        assert await run(worker, "x") == Ended(value=1)


async def test_a_program_that_prints_too_much_is_ended_and_its_variables_stay(python):
    limits = Limits(output_chars=20_000)
    async with started(limits, python=python) as worker:
        ended = await run(worker, "n = 0\nwhile True:\n    n += 1\n    print('x' * 1000)")
        assert (ended.error.type, ended.spoiled) == ("MemoryError", False)
        assert "Print less" in ended.error.hint
        assert 0 < len(worker.take_output()) <= limits.output_chars
        assert (await run(worker, "n")).value > 10


async def test_a_dump_holds_variables_functions_classes_and_names_of_modules(python):
    async with started(python=python) as worker:
        await run(worker, "import statistics as st\nclass E(Exception): pass\ndef f(x): return x + n\nn = 1")
        dump = await worker.dump()
    async with started(python=python) as other:
        await other.load(dump)
        assert await run(
            other, "try:\n    raise E('a')\nexcept E as e:\n    z = str(e)\nf(1), st.mean([1, 3]), z"
        ) == Ended(value=(2, 2, "a"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda dump: b"", "given is not the state"),
        (lambda dump: b"{}\n" + dump, "given is not the state"),
        (lambda dump: dump.replace(b'"version": "', b'"version": "other '), "Run its programs again"),
        (lambda dump: dump[: dump.index(b"\n") + 5], "The state of this sandbox is damaged"),
    ],
)
async def test_what_is_no_dump_is_refused_and_the_next_is_taken(python, damage, said):
    async with started(python=python) as worker:
        await run(worker, "x = 1")
        dump = await worker.dump()
        with pytest.raises(SandboxFailed, match=said):
            await worker.load(damage(dump))
        assert await worker.load(dump) is None
        assert await run(worker, "x") == Ended(value=1)


async def test_variables_are_shown_with_type_and_size_and_helpers_are_not(python):
    async with started(python=python) as worker:
        await run(worker, "import re\ntext = 'ab' * 100\nrows = [{'a': 1}, 'b' * 50]\nn = 3\nchunks(text, 50)\n_h = 1")
        shown = await worker.variables()
        assert shown == {
            "text": f"str, 200 characters: '{'ab' * 30}'…",
            "rows": f"list, 2 items: dict of 1, '{'b' * 30}'…",
            "n": "int: 3",
        }
        assert worker.take_output() == ""


async def test_a_cancelled_run_ends_its_process_and_a_dump_brings_a_new_one(python):
    async with started(python=python) as worker:
        await run(worker, "x = 1")
        dump = await worker.dump()
        await worker.run("llm_query('q')\nwhile True: pass")
        task = asyncio.ensure_future(worker.answer(1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await run(worker, "x")).spoiled
        await worker.load(dump)
        assert await run(worker, "x") == Ended(value=1)


async def test_close_ends_a_worker_whatever_it_is_doing(python):
    worker = await runtime(python).start(Limits(), ())
    task = asyncio.ensure_future(worker.run("while True: pass"))
    await asyncio.sleep(0)
    await worker.close()
    ended = await asyncio.wait_for(task, 30)
    assert ended.spoiled
    await worker.close()


async def test_a_worker_whose_process_dies_says_so_and_others_go_on(python):
    async with started(python=python) as worker, started(python=python) as other:
        await run(worker, "x = 1")
        dump = await worker.dump()
        os.kill(pid_of(worker), 9)
        while not (ended := await run(worker, "x")).spoiled:
            assert ended == Ended(value=1)  # what is around the interpreter takes a moment to die, and then it does
        assert "process has ended" in ended.error.message
        with pytest.raises(SandboxFailed, match="process has ended"):
            await worker.dump()
        assert await run(other, "1") == Ended(value=1)
        await worker.load(dump)
        assert await run(worker, "x") == Ended(value=1)


async def test_no_process_is_left_of_workers_that_were_closed(python):
    async with started(python=python) as worker:
        pid = pid_of(worker)
        assert is_alive(pid)
    wait_until(lambda: not is_alive(pid))  # it was killed; the system takes it away when its parent has looked


@pytest.mark.parametrize("how", ["closed", *(pytest.param(how, marks=pytest.mark.long) for how in ("busy", "left"))])
def test_a_python_that_exits_after_a_sandbox_is_not_aborted(python, how):
    code = f"""
import asyncio, os
from pathlib import Path
from mlx_mcp.workflows.sandbox.opening import open_runtime
from mlx_mcp.workflows.sandbox.runtime import Limits
async def main():
    runtime = await open_runtime(Path(os.environ["MLX_MCP_STATE_DIR"]) / "exits", {python!r})
    worker = await runtime.start(Limits(), ())
    print(await worker.run("1"))
    if {how!r} == "busy":
        asyncio.ensure_future(worker.run("while True: pass"))
        await asyncio.sleep(0)
    if {how!r} == "closed":
        await runtime.close()
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "value=1" in ended.stdout


async def test_half_characters_and_numbers_without_end_do_not_break_what_crosses(python):
    async with started(python=python) as worker:
        assert await run(worker, "x, len(x)", {"x": "a\ud800b"}) == Ended(value=("a?b", 3))
        await worker.run("y = llm_query('q')\ny")
        ended = await worker.answer({"a": ["\udfff", float("inf"), object]})
        assert ended.value["a"][:2] == ["?", float("inf")]


async def test_what_ends_as_a_result_can_be_written_as_json(python):
    async with started(python=python) as worker:
        ended = await run(worker, "import re\n(lambda: 1, len, re.compile('a'), ..., 1j, ValueError('x'), range(3))")
        assert json.dumps(ended.value)


async def test_a_worker_that_does_not_start_says_what_to_do(python, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr("mlx_mcp.workflows.sandbox.isolation.Enclosed.ready", lambda self: broken)
    with pytest.raises(SandboxFailed, match=r"interpreter does not start .* Try again; `mlx-mcp doctor` says"):
        await runtime(python).start(Limits(), ())
