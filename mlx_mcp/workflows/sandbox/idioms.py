"""Rewrites what programs are written with and the interpreter lacks. Knows Python's grammar, and no interpreter.

A program is parsed here, rewritten as a tree, and written out again. Lines of the new text are known by the statements
that they come from, so that an error tells the line of the program as it was sent. What a later program must know of an
earlier one, such as what `import statistics as st` has named, is a state that is dumped with the worker.

What is rewritten:

    next(x for x in xs)              iter([…]): the interpreter's generator expressions are lists
    key=str.lower, str.lower(x)      lambda …, x.lower()
    del x, del d[k]                  x = None, d.pop(k)
    def f(): … yield x               the values are collected, and f returns an iterator
    await f(x), asyncio.gather       host functions are called as they are; many calls are one batch
    map(llm_query, xs), ex.map(…)    the same
    import statistics                definitions of the prelude, by name
    class, raise, except             see `classes.py`
"""

from __future__ import annotations

import ast
import copy
import sys
import threading
import warnings
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mlx_mcp.workflows.sandbox.classes import Known, NotRun
from mlx_mcp.workflows.sandbox.explaining import explain
from mlx_mcp.workflows.sandbox.rewriting import Rewriting
from mlx_mcp.workflows.sandbox.runtime import ProgramError

MAX_CODE_CHARS = 40_000  # it is parsed in this process, in some 0.2 s at most
MAX_NESTING = 80  # of brackets: beyond it Python's own parser may take very long
_WARNINGS = threading.Lock()  # what is done with warnings belongs to the process, and programs are read on threads
DEEP = ProgramError("SyntaxError", "nested too deeply", None, "Build deep values in a loop, or with json.loads.")


@dataclass(frozen=True)
class Rewritten:
    """A program as the interpreter gets it, and which names of the prelude must be defined before it."""

    code: str
    used: frozenset[str] = frozenset()
    # What is wrong with it to this Python's grammar, which may be older than the interpreter's: it is as it was then.
    doubt: ProgramError | None = None


class Idioms:
    """Rewrites the programs of one sandbox, one after the other."""

    def __init__(self, functions: Collection[str], state: dict[str, Any] | None = None) -> None:
        """`functions` are the host functions; `state` is what `state()` gave."""
        self._functions = frozenset(functions)
        self._known = Known(**state) if state else Known()
        self._sent: ast.Module | None = None
        self._written = ""

    def state(self) -> dict[str, Any]:
        """What must be known to go on elsewhere, as JSON has it."""
        return asdict(self._known)

    def rewrite(self, code: str) -> Rewritten:
        """The program as the interpreter can run it.

        Raises:
            NotRun: it is no Python, too long, or has what can be neither run nor rewritten.
        """
        self._sent, self._written = None, code
        try:
            tree = parsed(code)
        except NotRun as exc:
            if exc.error.line is None or sys.version_info >= (3, 14):
                raise
            return Rewritten(code, doubt=exc.error)
        known = Known(**copy.deepcopy(asdict(self._known)))
        try:
            before = ast.dump(tree)
            rewriting = Rewriting(tree, self._functions, known)
            tree = ast.fix_missing_locations(rewriting.visit(tree))
            if ast.dump(tree) != before:
                self._sent, self._written = tree, ast.unparse(tree)
        except RecursionError:
            raise NotRun(DEEP) from None
        except ValueError:  # of an integer that Python does not print, written in another base
            hint = "Write it as a power, or make it of a text with int(text, 16)."
            raise NotRun(ProgramError("SyntaxError", "an integer is too long", None, hint)) from None
        self._known = known
        # An interpreter that gets no statement does not take the inputs either.
        return Rewritten(self._written if tree.body else "None", frozenset(rewriting.used))

    def line(self, line: int, column: int) -> int:
        """The line of the program as it was sent, for a place in the one that `rewrite` has written last."""
        if self._sent is None:
            return line
        best, found = (0, 0), line
        for sent, written in _pairs(self._sent, ast.parse(self._written)):
            start = (written.lineno, written.col_offset + 1)
            within = start <= (line, column) and line <= (written.end_lineno or 0)
            if within and start >= best:
                best, found = start, sent.lineno
        return found


def parsed(code: str) -> ast.Module:
    """The program as a tree.

    Raises:
        NotRun: it is no Python, or longer or deeper than is read here.
    """
    if len(code) > MAX_CODE_CHARS:
        hint = "Put data into files or variables, and send the program in several runs."
        raise NotRun(ProgramError("SyntaxError", f"the program has more than {MAX_CODE_CHARS} characters", None, hint))
    depth = 0
    for each in code:
        depth += (each in "([{") - (each in ")]}")
        if depth > MAX_NESTING:
            raise NotRun(DEEP)
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as "\d"
            return ast.parse(code)
    except SyntaxError as exc:
        raise NotRun(explain("SyntaxError", exc.msg, exc.lineno)) from None
    except (ValueError, RecursionError, MemoryError, SystemError) as exc:  # SystemError is a fault of Python's own
        error = ProgramError("SyntaxError", str(exc) if isinstance(exc, ValueError) else DEEP.message, None, DEEP.hint)
        raise NotRun(error) from None


Placed = ast.stmt | ast.expr


def _pairs(sent: ast.AST, written: ast.AST) -> Iterator[tuple[Placed, Placed]]:
    """Nodes with what has become of them; statements all, and what is in them where it is written as it was made."""
    for one, other in zip(ast.iter_child_nodes(sent), ast.iter_child_nodes(written), strict=False):
        if type(one) is not type(other):
            return
        if isinstance(one, Placed) and isinstance(other, Placed):
            yield one, other
        yield from _pairs(one, other)
