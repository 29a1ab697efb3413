"""Our readers on the cases of canitoolcall, a neutral conformance suite for tool-call and reasoning parsers."""

import pytest
from canitoolcall.results import Status

from tests.effort import drawn
from tests.formats import notations
from tests.formats.canitoolcall_cases import LISTED, ROOT, TABLE, families, fixtures, judged, table


@pytest.mark.parametrize("family", families())
def test_every_case_of_the_family_passes_or_is_listed_with_its_reason(family):
    cases = [fixture for fixture in fixtures().values() if fixture.family == family]
    verdicts = {fixture.id: judged(fixture, drawn(30)) for fixture in cases}
    failed = {case: rows for case, (status, rows) in verdicts.items() if status is Status.FAIL}
    assert {case: rows for case, rows in failed.items() if case not in LISTED} == {}
    assert {case for case in LISTED if case.startswith(f"{family}/")} <= set(failed), "they pass by now"


@pytest.mark.parametrize("case", LISTED)
def test_a_listed_case_is_read_alike_however_it_is_cut(case):
    checks = {row.check for row in judged(fixtures()[case], drawn(30))[1]}
    assert checks.isdisjoint({"split_invariance", "stream_equals_nonstream", "arguments_json"})


def test_the_table_of_families_is_current():
    found = TABLE.search((ROOT / "docs" / "models.md").read_text())
    assert found, "docs/models.md has no place for the table"
    assert found[0] == f"{found[1]}{table()}\n{found[2]}", "run `make formats`"


def test_the_table_of_notations_is_current():
    found = notations.TABLE.search((ROOT / "docs" / "models.md").read_text())
    assert found, "docs/models.md has no place for the table"
    assert found[0] == f"{found[1]}{notations.table()}{found[2]}", "run `make formats`"
