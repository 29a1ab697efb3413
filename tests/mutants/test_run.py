"""The table fits the tree, and whoever plants faults tells one that is caught from one that only breaks something."""

import textwrap

import pytest

from tests.mutants.mutant import fault
from tests.mutants.run import MUTANTS, ROOT, Report, judge, read_report, run, unsound

SOURCE = "def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return 2 * a\n"
TESTS = """
from mlx_mcp.core.sums import add, twice

def test_adding():
    assert add(2, 2) == 4

def test_adding_other_numbers():
    assert add(1, 2) == 3

def test_nothing_much():
    assert twice(0) == 0

def test_that_always_fails():
    assert add(1, 1) == 3
"""
TIMES = fault("times", "core/sums.py", "a + b", "a * b", "test_sums.py::test_adding_other_numbers")


@pytest.fixture
def tree(tmp_path):
    """A tree of one layer with one module."""
    for name, text in (("mlx_mcp/core/sums.py", SOURCE), ("tests/core/test_sums.py", TESTS)):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
        (path.parent.parent / "__init__.py").touch()
    return tmp_path


def test_the_table_fits_the_tree():
    faults = unsound(MUTANTS, ROOT)
    assert not faults, "\n\n".join(faults)


def test_every_layer_has_faults():
    layers = {
        "core",
        "storage",
        "mlx_backend",
        "engine",
        "service",
        "api",
        "hosting",
        "process",
        "install",
        "workflows",
    }
    assert {mutant.layer for mutant in MUTANTS} == layers


@pytest.mark.long
def test_a_fault_is_caught_by_the_test_that_fails_and_survives_those_that_pass(tree, capsys):
    weak = fault("weak", "core/sums.py", "2 * a", "3 * a", "test_sums.py::test_nothing_much")
    assert run([TIMES, weak], tree, jobs=1) == 1
    rows = [[cell.strip() for cell in row.split("|")[1:4]] for row in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["times", "core/sums.py", "adding other numbers"], ["weak", "core/sums.py", "**nothing**"]]
    assert (tree / "mlx_mcp/core/sums.py").read_text() == SOURCE


@pytest.mark.long
def test_a_test_that_fails_without_any_fault_catches_none(tree, capsys):
    wrong = fault("wrong", "core/sums.py", "a + b", "a * b", "test_sums.py::test_that_always_fails")
    assert run([wrong], tree, jobs=1) == 2
    assert "test_that_always_fails fails though nothing is planted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mutant", "words"),
    [
        (fault("x", "core/sums.py", "a - b", "a * b", *TIMES.tests), "has its snippet 0 times, not once"),
        (fault("x", "core/sums.py", "    return a+b", "", *TIMES.tests), "  2: return a + b\n"),
        (fault("x", "core/sums.py", "a", "b", *TIMES.tests), "times, not once"),
        (fault("x", "core/gone.py", "a", "b", *TIMES.tests), "there is no mlx_mcp/core/gone.py"),
        (fault("x", "core/sums.py", "a + b", "a +", *TIMES.tests), "is no Python any more"),
        (
            fault("x", "core/sums.py", "a + b", "a * b", "test_sums.py::test_gone"),
            "there is no tests/core/test_sums.py",
        ),
        (fault("x", "core/sums.py", "a + b", "a * b"), "no test is to catch it"),
    ],
)
def test_a_table_that_no_longer_fits_says_what_to_change(tree, mutant, words, capsys):
    assert run([mutant], tree) == 2
    assert words in capsys.readouterr().err
    assert not unsound([TIMES], tree)
    assert unsound([TIMES, TIMES], tree) == ["2 mutants are named 'times'."]


JUNIT = """
<testsuites><testsuite>
  <testcase classname="tests.core.test_sums" name="test_passes[1]"/>
  <testcase classname="tests.core.test_sums" name="test_hangs"><failure message="Failed: Timeout (&gt;60s)"/></testcase>
  <testcase classname="tests.core.test_sums" name="test_breaks"><error message="fixture"/></testcase>
  <testcase classname="tests.core.test_sums" name="test_skipped"><skipped/></testcase>
  {more}
</testsuite></testsuites>
"""
FAILS = '<testcase classname="tests.core.test_sums" name="test_fails"><failure message="assert 1 == 2"/></testcase>'


@pytest.mark.parametrize(
    ("status", "more", "caught_by"),
    [(1, FAILS, "tests/core/test_sums.py::test_fails"), (1, "", ""), (2, FAILS, ""), (0, "", ""), (None, FAILS, "")],
)
def test_what_breaks_or_hangs_proves_nothing(tmp_path, status, more, caught_by):
    (tmp_path / "report.xml").write_text(textwrap.dedent(JUNIT.format(more=more)))
    report = read_report(tmp_path / "report.xml", status, 1.0, "the end")
    assert report.passed == {"tests/core/test_sums.py::test_passes[1]"}
    assert report.others == ("tests/core/test_sums.py::test_hangs", "tests/core/test_sums.py::test_breaks")
    verdict = judge(TIMES, report)
    assert verdict.caught_by == caught_by
    assert bool(verdict.why) == (not caught_by)


def test_a_run_without_a_report_catches_nothing(tmp_path):
    report = read_report(tmp_path / "none.xml", 4, 1.0, "no such option")
    assert report == Report(4, frozenset(), (), (), 1.0, "no such option")
    assert "pytest ended with 4" in judge(TIMES, report).why
