"""How far it is from a tool to the device and back; docs/structure.md says what each part of the way is for."""

from pathlib import Path

from tests.way import EVERY_POINT, way_of_a_call

MAX_FUNCTIONS, MAX_FILES = 51, 25
STRUCTURE = Path(__file__).parent.parent / "docs" / "structure.md"


async def test_a_call_passes_no_more_functions_and_files_than_it_did():
    way = await way_of_a_call()
    assert way.seen == EVERY_POINT, "a function was renamed or is not called any more: POINTS has to follow"
    assert len(way.functions) <= MAX_FUNCTIONS, sorted(way.functions)
    assert len(way.by_file) <= MAX_FILES, list(way.by_file)


def test_the_way_is_as_long_as_the_structure_says():
    assert f"passes {MAX_FUNCTIONS} functions in {MAX_FILES} files" in STRUCTURE.read_text()
