"""Programs of the kind that models write: most do what CPython does, and the others are told what to write instead."""

import pytest

from tests.workflows.sandbox.running import run, started
from tests.workflows.sandbox.snippets import CONTEXT, FILES, printed_by_cpython, read_snippets

SNIPPETS = read_snippets()
# Those that do not run, and what their authors are told.
TOLD = {
    "classes: context manager by a generator": "Write a class with __enter__ and __exit__",
    "classes: a class that sorts itself": "Sort with key=",
    "classes: subclass of dict": "Keep a dict in an attribute of the class",
    "data: xml is not there": "Take the parts out with re",
    "data: pandas habit": "Write it with lists and dicts",
    "flow: numpy habit": "Write it with lists and dicts",
    "flow: infinite generator with islice": "Give it a number of values, and end the loop there",
}


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.name not in TOLD], ids=lambda s: s.name)
async def test_a_program_as_models_write_it_prints_what_cpython_prints(snippet):
    expected = printed_by_cpython(snippet.code) if snippet.printed is None else snippet.printed
    async with started() as worker:
        ended = await run(worker, snippet.code, {"context": CONTEXT, "files": FILES})
        assert ended.error is None, ended.error
        assert worker.take_output() == expected


@pytest.mark.parametrize("name", TOLD)
async def test_the_author_of_a_program_that_does_not_run_is_told_what_to_write_instead(name):
    snippet = next(each for each in SNIPPETS if each.name == name)
    async with started() as worker:
        ended = await run(worker, snippet.code, {"context": CONTEXT, "files": FILES})
        assert ended.error is not None
        assert TOLD[name] in ended.error.hint
        assert ended.error.line is not None
        assert not ended.spoiled


def test_nine_of_ten_programs_run():
    assert len({each.name for each in SNIPPETS}) == len(SNIPPETS) >= 100
    assert len(TOLD) <= len(SNIPPETS) // 10
