"""What any tier promises, by one set of tests over all."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from mlx_mcp.errors import StorageError
from mlx_mcp.storage.folder import Calls, Folder
from mlx_mcp.storage.memory_tier import MemoryTier
from mlx_mcp.storage.ssd_tier import SsdTier
from tests.storage.world import block, content, key_of, raw

ROOMY = 10**9


@contextmanager
def memory(tmp_path, limit_bytes=ROOMY):
    yield MemoryTier(limit_bytes)


@contextmanager
def ssd(tmp_path, limit_bytes=ROOMY):
    folder = Folder.open(tmp_path / "cache", Calls())
    tier = SsdTier(folder, limit_bytes, ROOMY)
    yield tier
    tier.close()
    folder.close()


pytestmark = pytest.mark.parametrize("kind", [memory, ssd])


def test_blocks_come_back_as_they_were_put(kind, tmp_path):
    blocks = [block(name, nbytes) for name, nbytes in [("small", 7), ("large", 200_000), ("empty", 0)]]
    with kind(tmp_path) as tier:
        tier.put(blocks)
        keys = [one.key for one in reversed(blocks)]
        assert [content(one) for one in tier.get(keys)] == [content(one) for one in reversed(blocks)]


def test_what_comes_back_does_not_change_with_what_was_given(kind, tmp_path):
    given = bytearray(b"before")
    with kind(tmp_path) as tier:
        tier.put([block("a", data=(memoryview(given),))])
        given[:] = b"after!"
        [got] = tier.get([key_of("a")])
        assert b"".join(got.data) == b"before"


def test_reading_ends_at_the_first_block_that_is_not_there(kind, tmp_path):
    with kind(tmp_path) as tier:
        tier.put([block("a"), block("c")])
        assert [one.key for one in tier.get([key_of("a"), key_of("b"), key_of("c")])] == [key_of("a")]
        assert tier.get([key_of("b"), key_of("a")]) == []
        assert tier.get([]) == []


def test_find_tells_what_a_block_is_without_reading_it(kind, tmp_path):
    with kind(tmp_path) as tier:
        assert tier.find(key_of("a")) is None
        tier.put([block("a", 300, window_start=16, has_state=False)])
        found = tier.find(key_of("a"))
        assert (found.nbytes, found.window_start, found.has_state) == (300, 16, False)


def test_a_block_that_is_there_as_rich_is_not_written_again(kind, tmp_path):
    with kind(tmp_path) as tier:
        assert tier.put([block("a"), block("b")]) > 0
        assert tier.put([block("a"), block("b", window_start=8), block("a", has_state=False)]) == 0
        assert tier.find(key_of("b")).window_start == 0


@pytest.mark.parametrize("richer", [{"has_state": True, "window_start": 16}, {"has_state": False, "window_start": 8}])
def test_a_richer_block_takes_the_place_of_a_poorer(kind, tmp_path, richer):
    poorer = block("a", 300, has_state=False, window_start=16)
    with kind(tmp_path) as tier:
        tier.put([poorer])
        assert tier.put([replace(poorer, data=(memoryview(b"richer"),), form=raw(6), **richer)]) > 0
        [got] = tier.get([key_of("a")])
        assert (b"".join(got.data), got.has_state, got.window_start) == (b"richer", *richer.values())


def test_of_two_blocks_of_a_key_in_one_call_the_richer_is_kept(kind, tmp_path):
    rich, poor = block("a", 30), block("a", 40, has_state=False)
    for name, blocks in [("first", [rich, poor]), ("last", [poor, rich])]:
        with kind(tmp_path / name) as tier:
            tier.put(blocks)
            assert tier.find(key_of("a")).has_state


def test_the_least_recently_used_goes_when_room_is_needed(kind, tmp_path):
    with kind(tmp_path, limit_bytes=35_000) as tier:
        for name in ("a", "b", "c"):
            tier.put([block(name, 10_000)])
        tier.get([key_of("a")])
        tier.put([block("d", 10_000)])
        assert [name for name in "abcd" if tier.find(key_of(name))] == ["a", "c", "d"]


def test_what_can_never_fit_is_refused_and_nothing_is_lost(kind, tmp_path):
    with kind(tmp_path, limit_bytes=35_000) as tier:
        tier.put([block("a", 10_000)])
        with pytest.raises(
            StorageError, match=r"the server started with a larger limit|bytes of blocks exceed the .*Raise the limit"
        ):
            tier.put([block("b", 40_000)])
        assert tier.find(key_of("a"))
        assert not tier.find(key_of("b"))


def test_a_deleted_block_is_gone_and_its_neighbours_stay(kind, tmp_path):
    with kind(tmp_path) as tier:
        tier.put([block("a"), block("b"), block("c")])
        tier.delete([key_of("b"), key_of("never there")])
        assert [name for name in "abc" if tier.get([key_of(name)])] == ["a", "c"]
