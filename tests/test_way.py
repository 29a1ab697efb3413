"""How far it is from a tool to the device and back; docs/structure.md says what each part of the way is for."""

from tests.way import EVERY_POINT, way_of_a_call

MAX_FUNCTIONS, MAX_FILES = 59, 32


async def test_a_call_passes_no_more_functions_and_files_than_it_did():
    way = await way_of_a_call()
    assert way.seen == EVERY_POINT, "a function was renamed: POINTS has to follow"
    assert len(way.functions) <= MAX_FUNCTIONS, sorted(way.functions)
    assert len(way.by_file) <= MAX_FILES, list(way.by_file)
