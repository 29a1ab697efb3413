"""What is told of exceptions: a type, a line, and what to write instead."""

import pytest

from mlx_mcp.workflows.sandbox.explaining import HINTS, MAX_CHARS, explain, limit_reached
from mlx_mcp.workflows.sandbox.runtime import Limits
from tests.workflows.sandbox.running import run, started

# Programs as models write them where they do not know the sandbox → what they are told.
TOLD = {
    "import requests\nrequests.get('http://x')": "There is no network here",
    "import sqlite3": "There is no sqlite3 here. Write what you need of it",
    "import subprocess": "no processes and no disk",
    "sorted(['a'], key=lambda x: llm_query(x))": "Ask first, then sort",
    "from dataclasses import dataclass\n@dataclass(order=True)\nclass A:\n    x: int": "Leave out order=",
    "class A:\n    def __lt__(self, o): return True\nsorted([A(), A()])": "Give sorted, min or max a key=",
    "import os\nos.environ['HOME']": "no environment variables",
    "import os\nos.listdir('/data')": "read files['/data']",
    "input('Name?')": "Nobody answers here",
    "globals()['x'] = 1": "Use a dict of your own",
    "FINAL('done')": "Hand in the result with submit(value)",
    "print(SHOW_VARS())": "Use show_vars()",
    "undefined + 1": "Define undefined first",
    "x = (5).bit_length()": "Write what bit_length does yourself",
    "from datetime import datetime\ndatetime.utcfromtimestamp(0)": "Write what datetime.datetime.utcfromtimestamp does",
    "raise ValueError('a', 'b')\n": "Give the exception one text",
    "class E: pass\nraise E()": "Raise a built-in exception",
    "def f(): return f()\nf()": "Use a loop",
    "import json\njson.loads('Sure! {')": "Give llm_query a schema",
    "try:\n    {}['a']\nexcept KeyError as e:\n    e.__cause__": "__cause__ is not known here",
    "async def f():\n    async with x: pass": "Collect the values in a list",
    "try: pass\nexcept* ValueError: pass": "Write it without exception groups",
    "await 3": "called without await",
    "print('a'": "Look at the line, and the one before it",
}


@pytest.mark.parametrize("program", TOLD)
async def test_the_author_is_told_what_to_write_instead(program):
    async with started() as worker:
        ended = await run(worker, program)
        assert ended.error is not None
        assert TOLD[program] in ended.error.hint, ended.error


async def test_an_exception_that_says_enough_has_no_hint():
    async with started() as worker:
        ended = await run(worker, "x = 1\ny = int('a')")
        assert (ended.error.type, ended.error.line, ended.error.hint) == ("ValueError", 2, "")
        assert "invalid literal" in ended.error.message


def test_every_hint_is_a_sentence_and_takes_its_groups():
    for pattern, hint in HINTS:
        assert hint[0].isupper() or hint.startswith("{"), hint
        assert hint.endswith("."), (pattern, hint)


def test_a_message_is_cut_whatever_a_program_puts_into_it():
    assert len(explain("ValueError", "x" * 10**6, 1).message) == MAX_CHARS
    error = explain("ValueError", "\x1e" + "N" * 10**5 + "\x1e" + "x" * 10**5, 1)
    assert (len(error.type), len(error.message)) == (MAX_CHARS, MAX_CHARS)


def test_a_limit_is_known_by_what_the_interpreter_says():
    limits = Limits(seconds=2, memory_bytes=1 << 20, output_chars=10)
    assert limit_reached(TimeoutError(), "TimeoutError: feed time limit exceeded: 2.1s > 2s", limits).spoiled
    assert limit_reached(MemoryError(), "memory limit exceeded: 9 bytes > 1048576 bytes", limits).spoiled
    assert not limit_reached(MemoryError(), "memory limit exceeded: 11 bytes > 10 bytes", limits).spoiled
    assert limit_reached(TimeoutError(), "the host said so", limits) is None
