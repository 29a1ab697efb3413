"""`make coverage-device` finds a question that was answered one way only, and a branch that was never taken."""

import pytest

from tests.device_branches import ROOT, Asked, missing, questions


@pytest.fixture
def all_of_it():
    asks, ifs = questions()
    said = {(str(ROOT / where), line, yes) for where, line in asks for yes in (True, False)}
    files = {where: {"missing_lines": [], "missing_branches": []} for where, _ in ifs}
    return said, {"files": files}


def test_nothing_is_missing_where_all_was_asked_and_taken(all_of_it):
    assert missing(*all_of_it) == []


def test_an_answer_that_was_never_given_is_named_with_its_line(all_of_it):
    said, coverage = all_of_it
    file, line, yes = min(said)
    assert missing(said - {(file, line, yes)}, coverage) == [
        f"{file.removeprefix(f'{ROOT}/')}:{line}: on_cpu() never said {yes}"
    ]


def test_a_branch_that_was_never_taken_is_named_with_its_line(all_of_it):
    said, coverage = all_of_it
    where, line = min(questions()[1])
    coverage["files"][where]["missing_branches"] = [[line, line + 1], [1, 2]]
    assert missing(said, coverage) == [f"{where}:{line}: never went on at line {line + 1}"]
    coverage["files"][where]["missing_lines"] = [line]
    assert missing(said, coverage) == [f"{where}:{line}: never reached"]


def test_every_question_of_the_backend_is_known():
    asks, ifs = questions()
    assert {where.rpartition("/")[2] for where, _ in asks} >= {"device.py", "layers.py", "loader.py", "sampler.py"}
    assert "prefill_cache.py" in {where.rpartition("/")[2] for where, _ in ifs}


def test_who_asks_is_written_down_with_the_answer(tmp_path):
    asked = Asked(lambda: True)
    assert asked()
    ((file, _, said),) = asked.said
    assert (file, said) == (__file__, True)
    asked.write(tmp_path)
    assert len(list(tmp_path.glob("asked-*.json"))) == 1
