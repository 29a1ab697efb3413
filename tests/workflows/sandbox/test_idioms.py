"""Programs with idioms that the interpreter lacks do what they do in CPython, or say what to write instead."""

from pathlib import Path

import pytest

from mlx_mcp.workflows.sandbox.classes import NotRun
from mlx_mcp.workflows.sandbox.idioms import Idioms
from mlx_mcp.workflows.sandbox.runtime import Ended
from tests.workflows.sandbox.running import run, started, value_of
from tests.workflows.sandbox.snippets import FILES, FUNCTIONS, printed_by_cpython, read_snippets

IDIOMS = Path(__file__).parent / "idioms.snippets"

# What is told of what can be neither run nor rewritten.
TOLD = {
    "def g():\n    while True:\n        yield 1": "end the loop there",
    "class A:\n    def __bool__(self): return False": "Write an ordinary method",
    "class A(list): pass": "Keep a list in an attribute",
    "class A:\n    @property\n    def x(self): pass\n    @x.setter\n    def x(self, v): pass": "Write a method set_x",
    "class A:\n    @classmethod\n    def format(cls): pass": "Give it another name",
    "class A:\n    class B: pass": "Define it before the other class",
    "from enum import Enum\nclass A(Enum):\n    X = 1\n    def f(self): pass": "Write functions beside it",
    "from typing import NamedTuple\nclass A(NamedTuple):\n    x: int\n    def f(self): pass": "Use @dataclass",
    "from statistics import harmonic_mean": "Of statistics there is: fmean, mean",
    "import threading\nthreading.Thread(target=print)": "Of threading there is: Lock",
    "vars(3)": "Name the attributes",
}


@pytest.mark.parametrize("snippet", read_snippets(IDIOMS), ids=lambda snippet: snippet.name)
async def test_an_idiom_does_what_it_does_in_cpython(snippet):
    async with started() as worker:
        ended = await run(worker, snippet.code, {"files": FILES})
        assert ended.error is None, ended.error
        assert worker.take_output() == printed_by_cpython(snippet.code)


@pytest.mark.parametrize("program", TOLD)
async def test_what_cannot_be_rewritten_is_told_with_its_line_and_what_to_write(program):
    with pytest.raises(NotRun) as refused:
        Idioms(FUNCTIONS).rewrite(program)
    assert TOLD[program] in refused.value.error.hint
    assert refused.value.error.line is not None


async def test_calls_of_the_model_over_a_list_are_one_batch():
    programs = (
        "list(map(llm_query, ['a', 'bb']))",
        "list(map(lambda x: llm_query(f'{x}'), ['a', 'bb']))",
        "def ask(x):\n    '''Ask.'''\n    return llm_query(x)\nlist(map(ask, ['a', 'bb']))",
        "import asyncio\nawait asyncio.gather(*[llm_query(x) for x in ['a', 'bb']])",
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
        "    r = list(pool.map(llm_query, ['a', 'bb']))\nr",
        "from concurrent.futures import ThreadPoolExecutor as Pool\nimport concurrent.futures\nwith Pool() as pool:\n"
        "    fs = [pool.submit(llm_query, x) for x in ['a', 'bb']]\n"
        "    concurrent.futures.wait(fs)\n[f.result() for f in fs]",
    )
    for program in programs:
        async with started() as worker:
            called = []
            assert await run(worker, program, called=called) == Ended(value=["yes 1", "no 2"]), program
            assert [call.name for call in called] == ["llm_query_batched"], program
            assert called[0].args == (["a", "bb"],)


async def test_a_pool_keeps_apart_what_is_asked_in_different_ways_and_hands_on_errors():
    program = (
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor() as pool:\n"
        "    a = pool.submit(llm_query, 'a')\n    b = pool.submit(llm_query, 'bb', schema={})\n"
        "    c = pool.submit(int, 'x')\n    d = pool.submit(len, 'abc')\n"
        "(a.result(), b.result(), type(c.exception()).__name__, d.result())"
    )
    async with started() as worker:
        called = []
        ended = await run(worker, program, called=called)
        assert ended == Ended(value=("yes 1", "no 2", "ValueError", 3))
        assert [call.kwargs for call in called] == [{}, {"schema": {}}]


async def test_a_program_that_has_a_name_of_its_own_keeps_it():
    program = (
        "def map(f, xs): return 'mine'\nlines = ['a']\ndef _(chunks): return chunks\nfilter = 3\n"
        "(map(1, 2), lines, _(4), filter)"
    )
    assert await value_of(program) == ("mine", ["a"], 4, 3)
    async with started() as worker:
        await run(worker, "chunks = [1]")
        assert await run(worker, "chunks") == Ended(value=[1])


async def test_names_of_modules_and_classes_are_known_in_later_runs():
    async with started() as worker:
        await run(
            worker,
            "import statistics as st\nimport collections\nclass E(Exception): pass\nclass A:\n"
            "    @property\n    def p(self): return 5",
        )
        program = "class F(E): pass\ntry:\n    raise F('a')\nexcept E as e:\n    r = type(e).__name__\n"
        ended = await run(worker, program + "(st.mean([1, 3]), dict(collections.OrderedDict(a=1)), r, A().p)")
        assert ended == Ended(value=(2, {"a": 1}, "F", 5))


async def test_an_exception_of_ones_own_that_nobody_catches_is_told_by_its_name():
    async with started() as worker:
        ended = await run(worker, "class Bad(ValueError): pass\n\nraise Bad('so bad')")
        assert (ended.error.type, ended.error.message, ended.error.line) == ("Bad", "so bad", 3)


async def test_files_can_be_opened_by_their_names_and_new_ones_are_kept():
    program = (
        "with open('app.log') as f:\n    n = [line.strip() for line in f]\nwith open('out.txt', 'w') as f:\n"
        "    f.write('hi')\n(n, files['out.txt'], open('src/app.log').read())"
    )
    async with started() as worker:
        files = {"files": {"src/app.log": "a\nb\n"}}
        assert await run(worker, program, files) == Ended(value=(["a", "b"], "hi", "a\nb\n"))
        ended = await run(worker, "open('no.txt')")
        assert "is not one of `files`" in ended.error.message


async def test_helpers_cut_search_and_show():
    program = (
        "(chunks('abcdefg', 4, 1), chunks([1, 2, 3], 2), grep('B', 'a\\nb', ignore_case=True), lines('a\\nb\\nc', 2), "
        "show_vars())"
    )
    assert await value_of(program, {"n": 3}) == (
        ["abcd", "defg"],
        [[1, 2], [3]],
        [(2, "b")],
        ["b", "c"],
        "n: int: 3",
    )


def test_a_program_without_anything_to_rewrite_is_left_as_it_is():
    program = "x = 1  # kept\nprint( x )\n"
    rewritten = Idioms(FUNCTIONS).rewrite(program)
    assert (rewritten.code, rewritten.used) == (program, frozenset())
