"""What a model that writes programs is told, the form of its replies, and what it is told of each program."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlx_mcp.chat.prompt import Grammar, GrammarKind
from mlx_mcp.workflows.reason_over.question import Question
from mlx_mcp.workflows.sandbox.sandbox import Ran

MAX_FEEDBACK_CHARS = 4_000
MAX_VARIABLES = 40
HEAD = 0.7  # of what is shown of a long output; the rest is its end

# One line of plan, then one block of code. A line of code that began with a backtick would end the block.
REPLY = Grammar(
    GrammarKind.LARK,
    'start: PLAN "```python\\n" LINE+ "```"\nPLAN: /[^`\\n]{1,300}\\n/\nLINE: /([^`\\n][^\\n]*)?\\n/\n',
)
READ = re.compile(r"(?P<plan>.*?)```[a-zA-Z]*\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)

RULES = """\
You answer a question about input that is too long to read. It lies in variables of a Python interpreter, and you \
write programs that run there. Reply each time with one line that says what you do next, then one block of code.

You see only what a program prints, at most {max_chars} characters of it. Variables stay from one program to the next.
- Look first: sizes, some lines, how it is built. Never print all of it.
- What is exact, do in Python: search (re), split, count, sort, add.
- What needs understanding, have models do: they see only what you pass, so pass the text itself, {chunk_chars} \
characters at most each. Ask many at once, never one by one in a loop:
{functions}
  A schema (a dict, a JSON schema) gives parsed objects. An answer that failed is None.
- Print what you would submit, and look whether it can be right. Then submit(value) ends the work.
There are no files and no network. Import nothing but re, json, math, datetime, itertools and collections.
"""
# What a first program may be, by the variable that has the input.
LOOK = {
    "context": "print(len(context), context[:500])",
    "files": "for name, text in list(files.items())[:20]:\n    print(name, len(text), text[:80])",
    "": "print(show_vars())",
}
BEGIN = "Begin. Reply with one line and one block of code."
EXTRACT = (
    "You can run no more programs. Give the best answer to the question that what you have seen allows, and nothing "
    "else:\n{}"
)
CUT_OFF = "Your reply was cut off, so nothing ran. Write a shorter program; do the rest in the next one."
NO_CODE = "Your reply had no block of code, so nothing ran. Reply with one line, then ```python, the code, and ```."
SILENT = "(Nothing was printed. Print what you want to see.)"


@dataclass(frozen=True)
class Reply:
    """What a model wants to do next."""

    plan: str
    code: str

    @property
    def key(self) -> str:
        """What is the same for two replies with the same program: space at the ends of lines does not count."""
        return "\n".join(line.rstrip() for line in self.code.strip().splitlines())


def read(text: str) -> Reply | None:
    """The reply that a text is; None if it has no whole block of code."""
    found = READ.search(text)
    return None if found is None else Reply(found["plan"].strip(), found["code"])


def rules(functions: Iterable[str], chunk_chars: int) -> str:
    """What a model is told once, the same for all questions; `functions` are lines that say how each is called."""
    listed = "\n".join(f"  {usage}" for usage in functions)
    return RULES.format(max_chars=MAX_FEEDBACK_CHARS, chunk_chars=chunk_chars, functions=listed)


def asked(question: Question, variables: Mapping[str, str]) -> str:
    """What a model is told of the question and of the input."""
    form = ""
    if question.schema is not None:
        form = f"\nSubmit a value that obeys this JSON schema: {json.dumps(question.schema, ensure_ascii=False)}"
    look = LOOK["context" if "context" in variables else "files" if "files" in variables else ""]
    example = f"A first reply may be:\nI look at the input.\n```python\n{look}\n```"
    return f"The variables:\n{listed(variables)}\n\nThe question: {question.text}{form}\n\n{example}"


def listed(variables: Mapping[str, str]) -> str:
    """The variables, a line each."""
    lines = [f"{name}: {what}" for name, what in variables.items() if not name.startswith("_")]
    more = [f"… and {len(lines) - MAX_VARIABLES} more"] if len(lines) > MAX_VARIABLES else []
    return "\n".join([*lines[:MAX_VARIABLES], *more]) or "(none)"


def told(ran: Ran, before: Mapping[str, str], after: Mapping[str, str], fault: str, turn: str) -> str:
    """What a model is told of its program: what it printed, how it failed, and what became of its variables."""
    error, value = ran.ended.error, ran.ended.value
    shown = SILENT if value is None or ran.said.submitted else f"(Nothing was printed. It ended in: {cut(repr(value))})"
    parts = [cut(ran.output).rstrip() or shown]
    if error is not None:
        line = "" if error.line is None else f" in line {error.line}"
        parts.append(f"The program failed{line}: {error.type}: {cut(error.message)}")
        if error.hint:
            parts.append(f"Hint: {error.hint}")
        if ran.ended.spoiled:
            parts.append("The variables are as they were before this program.")
    if fault:
        parts.append(f"What was submitted was not taken. {fault} Submit another value.")
    if ran.said.num_failed:
        first = ran.said.failures[0]
        parts.append(f"{ran.said.num_failed} answers failed and are None; the first ({first.index}): {first.error}")
    parts += ran.said.notes
    changed = {name: what for name, what in after.items() if before.get(name) != what}
    if changed:
        parts.append(f"New or changed variables:\n{listed(changed)}")
    return "\n".join([*parts, turn])


def compacted(variables: Mapping[str, str], num_steps: int, latest: str) -> str:
    """What a model is told in place of all that was said, when there is no more room for that."""
    return (
        f"You have run {num_steps} programs already. What was said meanwhile is gone, to make room; what they left is "
        f"in the variables, which now are:\n{listed(variables)}\n\nOf the latest program you were told:\n{latest}"
    )


def cut(text: str) -> str:
    """A text of bounded length: its beginning and its end, with what is said of the rest between."""
    if len(text) <= MAX_FEEDBACK_CHARS:
        return text
    head = round(MAX_FEEDBACK_CHARS * HEAD)
    tail = MAX_FEEDBACK_CHARS - head
    return f"{text[:head]}\n[{len(text) - MAX_FEEDBACK_CHARS} characters are left out]\n{text[-tail:]}"
