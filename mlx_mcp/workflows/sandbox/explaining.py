"""What the author of a program is told of the exception that ended it: type, line, and what to write instead."""

from __future__ import annotations

import re

from mlx_mcp.workflows.sandbox.runtime import Ended, Limits, ProgramError

ENDED = "the sandbox's process has ended. Run the program again: the variables are those of before it"
ASKED = (
    "the program looked too often at the clock, or at files and names that are not there, or asked too often with "
    "values that are too large. Do without: its variables are those of before"
)

MAX_CHARS = 2000  # of a message: a program may put anything into its exceptions
# The exceptions that a host call can raise.
EXCEPTION_TYPES = frozenset(
    "SystemExit TimeoutError RuntimeError ValueError TypeError KeyError OSError PermissionError FileNotFoundError "
    "MemoryError NameError NotImplementedError Exception".split()
)
# "Type: message" → what to write instead, the first that is found; `{1}` is the first group.
ANYWHERE: tuple[tuple[str, str], ...] = (
    (r"name '(FINAL|FINAL_VAR|SUBMIT)' is not defined", "Hand in the result with submit(value)."),
    (r"name '(SHOW_VARS)' is not defined", "Use show_vars()."),
    (
        r"name '(\w+)' is not defined",
        "Define {1} first. Variables of earlier runs stay, those of a run that was undone do not.",
    ),
    (r"RecursionError", "Use a loop, with a list of what is still to be done."),
    (
        r"JSONDecodeError",
        "Give llm_query a schema: what comes back is then parsed. Or look at the text with repr(text[:200]).",
    ),
    (r"unterminated|was never closed|unexpected EOF|invalid syntax", "Look at the line, and the one before it."),
)
# What else is said in pydantic-monty, and before that: it has less of Python.
HINTS: tuple[tuple[str, str], ...] = (
    (
        r"No module named '(numpy|pandas|polars|scipy)",
        "There is no {1} here. Write it with lists and dicts; statistics, collections and csv are there.",
    ),
    (
        r"No module named '(requests|httpx|urllib|socket|aiohttp|http)",
        "There is no network here. Work on `context` and `files`, and ask the model with llm_query.",
    ),
    (
        r"No module named '(xml|bs4|lxml|yaml)",
        "There is no {1} here. Take the parts out with re, for instance re.findall(r'<b>(.*?)</b>', text).",
    ),
    (
        r"No module named '(subprocess|multiprocessing|ctypes|shutil|tempfile|glob)",
        "There are no processes and no disk.",
    ),
    (
        r"No module named '([\w.]+)",
        "There is no {1} here. Write what you need of it; there are re, json, csv, math, datetime, collections, "
        "itertools, functools, statistics, heapq, textwrap, string, random, hashlib.",
    ),
    (r"cannot import name '(total_ordering|cmp_to_key)'", "Sort with key=, a function that returns what to sort by."),
    (r"cannot import name 'contextmanager'", "Write a class with __enter__ and __exit__."),
    (r"cannot import name '(\w+)' from '([\w.]+)'", "There is no {2}.{1} here: write what you need of it."),
    (r"module '([\w.]+)' has no attribute '(\w+)'", "{1} has no {2} here: write what you need of it."),
    (
        r"cannot suspend in this synchronous context",
        "Ask first, then sort: keys = llm_query_batched([...]); sorted(zip(keys, items)). No function of the host "
        "can be called within key=, or within a method like __repr__ or __eq__.",
    ),
    (r"dataclass\(\) does not yet support the (\w+) option", "Leave out {1}=; sort with key=, for instance."),
    (r"does not yet support (yield|async)", "Collect the values in a list, and return that."),
    (r"class inheritance and metaclasses", "Write a class without bases, or keep the other object in an attribute."),
    (r"method decorators", "Write a plain method, or a function beside the class."),
    (r"does not yet support (?:the )?(.+)", "Write it without {1}."),
    (r"can't be awaited", "Functions of the host are called without await."),
    (r"'list' object is not an iterator", "Use next(iter(values), default)."),
    (
        r"not supported between instances of '(\w+)' and '\1'",
        "Give sorted, min or max a key=: a number, text or tuple.",
    ),
    (r"Permission denied: '(.*)'", "There is no disk here: read files['{1}'], and keep results in variables."),
    (r"'os.environ' is not supported", "There are no environment variables here."),
    (r"FileNotFoundError: .* is not one of `files`", "Take a name that is in `files`."),
    (r"name '(input|help|breakpoint)' is not defined", "Nobody answers here: print what you want to say."),
    (r"name '(globals|vars|dir|memoryview|bytearray|compile|delattr)' is not defined", "Use a dict of your own."),
    (
        r"'(str|int|float|bytes|list|dict|datetime\.\w+)' object has no attribute '(\w+)'",
        "Write what {2} does yourself.",
    ),
    (r"type object '([\w.]+)' has no attribute '(\w+)'", "Write what {1}.{2} does yourself."),
    (
        r"object has no attribute '(__dict__|__cause__|msg|pos|lineno|__name__)'",
        "{1} is not known here: do without it.",
    ),
    (r"exceptions can only be called with zero or one string", "Give the exception one text."),
    (r"exceptions must derive from BaseException", "Raise a built-in exception, or a class that inherits from one."),
    (r"Internal error in monty", "Write the line in a simpler way."),
    *ANYWHERE,
)
# What else is said in CPython.
CPYTHON_HINTS: tuple[tuple[str, str], ...] = (
    (r"No module named '([\w.]+)'", "{1} is not installed beside mlx-mcp. Write what you need of it."),
    (
        r"Network is unreachable|urlopen error|Name or service not known|Temporary failure in name resolution",
        "There is no network here. Work on `context` and `files`, and ask the model with llm_query.",
    ),
    (
        r"Read-only file system|FileNotFoundError",
        "There is no disk here but /tmp, which is emptied after each run: read files['name'], and keep results in "
        "variables.",
    ),
    (
        r"in 'await' expression|'await' outside",
        "Functions of the host are called without await; llm_map asks many at once.",
    ),
    (r"PermissionError.*Operation not permitted", "There are no processes and no network here."),
    *ANYWHERE,
)


def explain(type_name: str, message: str, line: int | None, hints: tuple[tuple[str, str], ...] = HINTS) -> ProgramError:
    """The exception with a hint. `line` counts from 1 in `code`, as it was sent."""
    if message.count("\x1e") >= 2 and message.startswith(
        "\x1e"
    ):  # an exception of the program's own (`inside/objects.py`)
        _, type_name, message = message.split("\x1e", 2)
        return ProgramError(type_name[:MAX_CHARS], message[:MAX_CHARS], line, "")
    message = message[:MAX_CHARS]
    text = f"{type_name}: {message}"
    for pattern, hint in hints:
        if found := re.search(pattern, text):
            return ProgramError(type_name, message, line, hint.format(found[0], *found.groups()))
    return ProgramError(type_name, message, line, "")


def limit_reached(error: BaseException, message: str, limits: Limits) -> Ended | None:
    """How a program ended that reached a limit, if it did. A program that says the same is taken at its word."""
    if isinstance(error, TimeoutError) and "feed time limit exceeded" in message:
        return too_slow(limits)
    if isinstance(error, MemoryError) and message.endswith(f"> {limits.output_chars} bytes"):
        return too_much_output(limits)
    return too_much_memory(limits) if isinstance(error, MemoryError) else None


def too_much_output(limits: Limits) -> Ended:
    """How a program ended that printed more than it may. Its variables stay."""
    hint = "Print less: counts, or the first few. What is large belongs in a variable."
    text = f"the program printed more than {limits.output_chars} characters"
    return Ended(error=ProgramError("MemoryError", text, None, hint))


def too_much_memory(limits: Limits) -> Ended:
    """How a program ended that needed more memory than it may."""
    hint = "Keep less at once: go through the text in chunks, and do not copy it."
    text = f"the program needed more than {limits.memory_bytes >> 20} MiB"
    return Ended(error=ProgramError("MemoryError", text, None, hint), spoiled=True)


def too_slow(limits: Limits) -> Ended:
    """How a program ended that took longer than it may."""
    hint = "Do less in one run: search with `re` before you loop, take a part of the input, or go on in a next run."
    error = ProgramError("TimeoutError", f"the program ran for more than {limits.seconds:g} s", None, hint)
    return Ended(error=error, spoiled=True)


def spoiled(message: str) -> Ended:
    """How a program ended whose process is gone."""
    return Ended(error=ProgramError("RuntimeError", message, None, ""), spoiled=True)


def raisable(type: str, message: str) -> tuple[str, str]:
    """The exception that a host call raises, as one of a type that every program knows."""
    return (type, message) if type in EXCEPTION_TYPES else ("RuntimeError", f"{type}: {message}")
