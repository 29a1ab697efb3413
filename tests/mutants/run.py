"""Plants one fault at a time in a copy of the tree, and sees whether the tests of the fault's own layer notice it.

    python -m tests.mutants.run [--only WORDS] [--jobs N]

A fault counts as caught only if a test that passes without it fails: pytest ends with 1, and its report has a failure
that is no time-out. A module that cannot be imported, a fixture that breaks or a process that hangs proves nothing. The
table goes to stdout as Markdown. Ends with 1 if a fault survives, with 2 if the table of faults is not sound or a test
fails without any fault. The checkout itself is never changed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree

from tests.mutants import api, core, engine, hosting, install, mlx_backend, process, service, storage, workflows
from tests.mutants.mutant import Mutant

LAYERS = (core, storage, mlx_backend, engine, service, api, hosting, process, install, workflows)
MUTANTS = [mutant for layer in LAYERS for mutant in layer.MUTANTS]
ROOT = Path(__file__).parents[2]
COPIED = ("mlx_mcp", "tests", "pyproject.toml")
TEST_S, RUN_S = 60, 240  # how long a test may take, and all that are run for one fault


# Whether the table is sound


def unsound(mutants: Sequence[Mutant], root: Path) -> list[str]:
    """What is wrong with a table, in words that say what to change; nothing where it fits the tree."""
    names = Counter(mutant.name for mutant in mutants)
    found = [f"{count} mutants are named {name!r}." for name, count in names.items() if count > 1]
    for mutant in mutants:
        found += [f"{mutant.name!r}: {fault}" for fault in (*wrong_snippet(mutant, root), *wrong_tests(mutant, root))]
    return found


def wrong_snippet(mutant: Mutant, root: Path) -> Iterator[str]:
    """Why a fault cannot be planted."""
    path = root / mutant.path
    if not path.is_file():
        yield f"there is no {mutant.path}. Give the file that has the code now in `file` of {mutant.table}."
        return
    text = path.read_text()
    count = text.count(mutant.old)
    if count != 1:
        first = max(mutant.old.splitlines(), key=len).strip()
        lines = {line.strip(): n for n, line in enumerate(text.splitlines(), 1)}
        near = [f"  {lines[line]}: {line}" for line in difflib.get_close_matches(first, lines, 3, 0.5)]
        yield (
            f"{mutant.path} has its snippet {count} times, not once:\n{mutant.old}\n"
            + ("Lines like it are now\n" + "\n".join(near) if near else "No line is like it now.")
            + f"\nCopy the code as it stands into `old` of {mutant.table}, and the same code with the fault into `new`."
        )
        return
    try:
        compile(planted(mutant, text), mutant.path, "exec")
    except SyntaxError as error:
        yield f"with it {mutant.path} is no Python any more: {error}. Correct `new` of {mutant.table}."


def wrong_tests(mutant: Mutant, root: Path) -> Iterator[str]:
    """Which tests are not there."""
    if not mutant.tests:
        yield f"no test is to catch it. Name one in `tests` of {mutant.table}."
    for test in mutant.test_ids:
        file, _, name = test.partition("::")
        if not (root / file).is_file() or name.partition("[")[0] not in functions(root / file):
            yield f"there is no {test}. Give the test's name as it is now in `tests` of {mutant.table}."


@cache
def functions(path: Path) -> set[str]:
    """The names of a module's functions."""
    defined = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, defined)}


def planted(mutant: Mutant, text: str) -> str:
    """A file's text with the fault."""
    return text.replace(mutant.old, mutant.new)


# Running tests in a copy


@dataclass(frozen=True)
class Report:
    """What came of a run of pytest."""

    status: int | None  # None: it did not end in time
    passed: frozenset[str]  # ids of tests
    failed: tuple[str, ...]  # in order; without those that ran out of time
    others: tuple[str, ...]  # that ran out of time, or could not begin
    seconds: float
    output: str


class Copy:
    """A throw-away copy of the tree."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (root / name).exists():
                shutil.copy(root / name, folder / name)

    @contextmanager
    def with_fault(self, mutant: Mutant) -> Iterator[None]:
        """Have the fault in the copy for a while."""
        path = self.folder / mutant.path
        text = path.read_text()
        self._write(path, planted(mutant, text))
        try:
            yield
        finally:
            self._write(path, text)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text)
        # Python knows by time and size whether what it has compiled is out of date: both may be the same.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def run(self, tests: Sequence[str], stop_early: bool) -> Report:
        """Run these tests, alone and in their order; with `stop_early` until one fails."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
        command += ["-o", "filterwarnings="]  # a warning is no proof, and comes whenever garbage is collected
        command += [f"--timeout={TEST_S}", f"--junitxml={report}", *(["-x"] if stop_early else []), *tests]
        if importlib.util.find_spec("hypothesis"):
            command.insert(4, "--hypothesis-seed=0")
        environ = {k: v for k, v in os.environ.items() if k not in ("EFFORT", "PYTEST_ADDOPTS", "PYTHONSAFEPATH")}
        environ |= {"PYTHONPATH": str(self.folder), "LONG": "1"}  # for the processes that tests start elsewhere
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self.folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=RUN_S * (1 if stop_early else 10))
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            output, status = process.communicate()[0], None
        shutil.rmtree(self.folder / ".hypothesis", ignore_errors=True)  # what was found stays with its fault
        return read_report(report, status, time.monotonic() - began, output)


def read_report(path: Path, status: int | None, seconds: float, output: str) -> Report:
    """A report out of what pytest wrote."""
    passed, failed, others = set(), [], []
    for case in ElementTree.parse(path).iter("testcase") if path.is_file() else ():
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        failure = case.find("failure")
        if failure is not None and "Timeout (>" not in failure.get("message", ""):
            failed.append(test)
        elif failure is not None or case.find("error") is not None:
            others.append(test)
        elif case.find("skipped") is None:
            passed.add(test)
    return Report(status, frozenset(passed), tuple(failed), tuple(others), seconds, output)


# Verdicts


@dataclass(frozen=True)
class Verdict:
    """What came of one fault."""

    mutant: Mutant
    caught_by: str  # a test; empty if it survived
    seconds: float
    why: str = ""  # it counts as a survivor


def judge(mutant: Mutant, report: Report) -> Verdict:
    """Whether a run of a fault's tests has caught it."""
    if report.status == 1 and report.failed:
        return Verdict(mutant, report.failed[0], report.seconds)
    tail = "\n".join(report.output.splitlines()[-8:])
    if report.status == 0:
        why = "all its tests passed"
    elif report.status is None:
        why = f"its tests did not end within {RUN_S} s, which proves nothing"
    elif report.others:
        why = f"{report.others[0]} could not begin or ran out of time, which proves nothing"
    else:
        why = f"pytest ended with {report.status}, which proves nothing:\n{tail}"
    return Verdict(mutant, "", report.seconds, why)


def baseline(copies: Sequence[Copy], mutants: Sequence[Mutant]) -> list[str]:
    """What is wrong with the tests where no fault is planted; each must be there and pass."""
    tests = sorted({test for mutant in mutants for test in mutant.test_ids})
    files = sorted({test.partition("::")[0] for test in tests})
    found: list[str] = []

    def look(number: int) -> None:
        share = [test for test in tests if files.index(test.partition("::")[0]) % len(copies) == number]
        if not share:
            return
        report = copies[number].run(share, stop_early=False)
        ran = {test.partition("[")[0] for test in report.passed} | report.passed
        found.extend(f"{test} fails though nothing is planted." for test in (*report.failed, *report.others))
        found.extend(f"{test} was not run, or skipped." for test in share if test not in ran)
        if report.status != 0:
            found.append("\n".join(report.output.splitlines()[-30:]))

    at_once([partial(look, number) for number in range(len(copies))])
    return found


def at_once(work: Sequence[Callable[[], None]]) -> None:
    """Do each on a thread of its own, and wait."""
    threads = [threading.Thread(target=each, daemon=True) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def try_all(copies: Sequence[Copy], mutants: Sequence[Mutant]) -> list[Verdict]:
    """Plant every fault; a verdict for each, in order."""
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        waiting.put(mutant)
    verdicts: dict[str, Verdict] = {}

    def work(copy: Copy) -> None:
        while True:
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            with copy.with_fault(mutant):
                verdict = judge(mutant, copy.run(mutant.test_ids, stop_early=True))
            verdicts[mutant.name] = verdict
            outcome = "caught  " if verdict.caught_by else "SURVIVED"
            say(f"{outcome} {verdict.seconds:5.1f} s  {mutant.name}  {verdict.why}")

    at_once([partial(work, copy) for copy in copies])
    return [verdicts[mutant.name] for mutant in mutants]


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in Markdown."""
    rows = ["| mutant | file | caught by | seconds |", "|---|---|---|---|"]
    for v in verdicts:
        caught_by = v.caught_by.partition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
        rows.append(f"| {v.mutant.name} | {v.mutant.file} | {caught_by or '**nothing**'} | {v.seconds:.1f} |")
    return "\n".join(rows)


def say(line: str) -> None:
    """Tell whoever watches."""
    print(line, file=sys.stderr, flush=True)


def run(mutants: Sequence[Mutant], root: Path = ROOT, jobs: int = 2) -> int:
    """Plant these faults in copies of a tree; prints the table, and returns the status to end with."""
    if faults := unsound(mutants, root):
        say("\n\n".join(faults))
        return 2
    began = time.monotonic()
    with ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-mcp-mutants-")) for _ in range(jobs)]
        copies = [Copy(root, Path(os.path.realpath(folder))) for folder in folders]
        if faults := baseline(copies, mutants):
            say("\n".join(faults))
            return 2
        say(f"all tests pass without a fault: {time.monotonic() - began:.0f} s")
        verdicts = try_all(copies, mutants)
    print(table(verdicts))
    survivors = [v for v in verdicts if not v.caught_by]
    say(f"{len(verdicts) - len(survivors)} of {len(verdicts)} caught in {time.monotonic() - began:.0f} s")
    return 1 if survivors else 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose name or file has this in it")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="how many at a time")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name or options.only in mutant.file]
    if not chosen:
        parser.error(f"no mutant has {options.only!r} in its name or file")
    sys.exit(run(chosen, jobs=options.jobs))


if __name__ == "__main__":
    main()
