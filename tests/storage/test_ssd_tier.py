"""Files of blocks: what is found again, what goes for room, for the day's budget, and for good."""

import threading
from contextlib import contextmanager

import pytest

from mlx_mcp.errors import StorageError
from mlx_mcp.storage import segment
from mlx_mcp.storage.daily_budget import DAY_S
from mlx_mcp.storage.folder import Calls, Folder
from mlx_mcp.storage.ssd_tier import SsdTier
from tests.storage.world import T0, block, content, key_of, scratch

ROOMY = 10**9


@contextmanager
def opened(path, quota_bytes=ROOMY, daily_bytes=ROOMY, wanted=(), wall=lambda: T0, calls=None):
    folder = Folder.open(path, calls or Calls())
    tier = SsdTier(folder, quota_bytes, daily_bytes, lambda key: key in [key_of(name) for name in wanted], wall)
    yield tier
    tier.close()
    folder.close()


def there(tier, names):
    """Those of the blocks that can be read, in a row of letters."""
    return "".join(name for name in names if tier.get([key_of(name)]))


def files(path):
    return sorted(path.glob("*.blocks.safetensors"))


def damage(path, name):
    """Flip one bit of a block's payload, wherever it is."""
    for file in files(path):
        data = bytearray(file.read_bytes())
        at = data.find(b"".join(block(name).data))
        if at >= 0:
            data[at] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError(f"{name} is nowhere")


def test_blocks_are_found_again_after_a_restart(tmp_path):
    blocks = [block(name) for name in "abc"]
    with opened(tmp_path / "cache") as tier:
        tier.put(blocks)
    with opened(tmp_path / "cache") as tier:
        got = tier.get([one.key for one in blocks])
        assert [content(one) for one in got] == [content(one) for one in blocks]
        assert got[0].has_state


@pytest.mark.long
def test_ten_thousand_blocks_take_one_open_and_one_read_per_file_to_find():
    class Counting(Calls):
        num_opens = num_reads = 0

        def open(self, name, flags, dir_fd=None):
            self.num_opens += str(name).endswith(".blocks.safetensors")
            return super().open(name, flags, dir_fd)

        def pread(self, fd, nbytes, offset):
            self.num_reads += 1
            return super().pread(fd, nbytes, offset)

    with scratch() as parent:
        with opened(parent / "cache") as tier:
            tier.put([block(str(number), 30) for number in range(10_000)])
        calls = Counting()
        with opened(parent / "cache", calls=calls) as tier:
            assert tier.stats.blocks == 10_000
        assert calls.num_opens == len(files(parent / "cache")) == 157  # 64 blocks a file
        assert calls.num_reads == calls.num_opens + 2  # and both copies of the key


def test_a_file_is_read_once_for_blocks_that_follow_each_other(tmp_path):
    class Counting(Calls):
        opened = ()

        def open(self, name, flags, dir_fd=None):
            self.opened += (name,)
            return super().open(name, flags, dir_fd)

    calls = Counting()
    with opened(tmp_path / "cache", calls=calls) as tier:
        tier.put([block(str(number)) for number in range(64)])
        calls.opened = ()
        assert len(tier.get([key_of(str(number)) for number in range(64)])) == 64
        assert len(calls.opened) == 1


def test_a_block_that_a_durable_session_needs_is_never_evicted(tmp_path):
    with opened(tmp_path / "cache", quota_bytes=35_000, wanted="a") as tier:
        for name in "abcde":
            tier.put([block(name, 10_000)])
        assert there(tier, "abcde") == "ade"
        assert tier.stats.evicted == 2


def test_when_durable_sessions_fill_the_quota_the_error_gives_the_figures(tmp_path):
    with opened(tmp_path / "cache", quota_bytes=35_000, wanted="abc") as tier:
        tier.put([block(name, 10_000) for name in "abc"])
        with pytest.raises(StorageError, match=r"do not fit: durable sessions take 0\.0 MB .* Close sessions"):
            tier.put([block("d", 10_000)])
        assert there(tier, "abcd") == "abc"


def test_a_file_that_durable_sessions_share_with_others_is_written_anew_without_those(tmp_path):
    with opened(tmp_path / "cache", quota_bytes=35_000, wanted="b") as tier:
        tier.put([block(name, 10_000) for name in "abc"])
        tier.put([block("d", 10_000)])
        assert there(tier, "abcd") == "bd"
        assert sum(file.stat().st_size for file in files(tmp_path / "cache")) == tier.stats.bytes <= 35_000


def test_blocks_of_one_put_do_not_push_each_other_out(tmp_path):
    with opened(tmp_path / "cache", quota_bytes=35_000) as tier:
        for name in "abc":
            tier.put([block(name, 10_000)])
        tier.put([block("a", 10_000), block("d", 10_000)])  # a is the least recently used
        assert there(tier, "abcd") == "acd"


def test_the_quota_holds_for_files_to_the_byte(tmp_path):
    with opened(tmp_path / "cache", quota_bytes=20_000) as tier:
        for number in range(100):
            tier.put([block(f"{number} {part}", 37 * part) for part in range(number % 7)])
            on_disk = sum(file.stat().st_size for file in files(tmp_path / "cache"))
            assert tier.stats.bytes == on_disk <= 20_000


def test_a_smaller_quota_after_a_restart_holds_from_the_next_put(tmp_path):
    with opened(tmp_path / "cache") as tier:
        for name in "abc":
            tier.put([block(name, 10_000)])
    with opened(tmp_path / "cache", quota_bytes=25_000) as tier:
        tier.put([block("d", 10_000)])
        assert there(tier, "abcd") == "cd"  # without reads the order is that of writing


def test_offloads_stop_when_the_days_budget_is_used_up_and_go_on_the_next_day(tmp_path):
    now = [T0]
    with opened(tmp_path / "cache", daily_bytes=25_000, wall=lambda: now[0]) as tier:
        assert tier.put([block("a", 10_000)], offload=True) > 10_000
        assert tier.put([block("b", 10_000)], offload=True) > 10_000
        assert tier.put([block("c", 10_000), block("d", 10_000)], offload=True) == 0
        assert tier.stats.dropped == 2
        assert tier.put([block("e", 10_000)]) > 10_000, "a session is persisted all the same"
        assert tier.stats.written_bytes > 30_000
        now[0] += DAY_S
        assert tier.stats.written_bytes == 0
        assert tier.put([block("c", 10_000)], offload=True) > 10_000


def test_the_days_budget_outlives_a_restart(tmp_path):
    def opened_today():
        return opened(tmp_path / "cache", daily_bytes=25_000, wall=lambda: files(tmp_path / "cache")[0].stat().st_mtime)

    with opened(tmp_path / "cache") as tier:
        tier.put([block("a", 10_000), block("b", 10_000)], offload=True)
    with opened_today() as tier:
        assert tier.put([block("c", 10_000)], offload=True) == 0


def test_deleting_removes_the_bytes_from_every_file(tmp_path):
    secret = b"".join(block("secret").data)
    with opened(tmp_path / "cache") as tier:
        tier.put([block("a"), block("secret", has_state=False)])
        tier.put([block("secret"), block("b")])  # richer: now both files have it
        assert sum(secret in file.read_bytes() for file in files(tmp_path / "cache")) == 2
        tier.delete([key_of("secret")])
        assert not any(secret in file.read_bytes() for file in files(tmp_path / "cache"))
        assert there(tier, "ab") == "ab"
    with opened(tmp_path / "cache") as tier:
        assert there(tier, ["a", "b", "secret"]) == "ab"


def test_a_file_whose_blocks_are_all_there_anew_goes(tmp_path):
    with opened(tmp_path / "cache") as tier:
        tier.put([block("a", has_state=False), block("b", has_state=False)])
        [old] = files(tmp_path / "cache")
        tier.put([block("a")])
        assert old.exists(), "b is nowhere else"
        tier.put([block("b")])
        assert not old.exists()


def test_a_damaged_block_is_a_miss_and_a_count_and_its_neighbours_are_read(tmp_path):
    with opened(tmp_path / "cache") as tier:
        tier.put([block(name) for name in "abc"])
        damage(tmp_path / "cache", "b")
        assert [one.key for one in tier.get([key_of(name) for name in "abc"])] == [key_of("a")]
        assert tier.find(key_of("b")) is None
        assert there(tier, "abc") == "ac"
        assert (tier.stats.corrupt, tier.stats.blocks) == (1, 2)


def test_a_damaged_block_that_is_put_again_is_sound_after_a_restart_too(tmp_path):
    with opened(tmp_path / "cache") as tier:
        tier.put([block("a"), block("b")])
        damage(tmp_path / "cache", "b")
        tier.get([key_of("b")])
        tier.put([block("b")])
        assert there(tier, "ab") == "ab"
    with opened(tmp_path / "cache") as tier:
        assert there(tier, "ab") == "ab"
        assert tier.stats.corrupt == 0


def test_a_file_without_a_sound_block_goes(tmp_path):
    with opened(tmp_path / "cache") as tier:
        tier.put([block("a"), block("b")])
        damage(tmp_path / "cache", "a")
        damage(tmp_path / "cache", "b")
        assert there(tier, "ab") == ""
        assert files(tmp_path / "cache") == []
        assert tier.stats.bytes == 0


def test_deleting_a_neighbour_of_a_damaged_block_keeps_the_sound_ones(tmp_path):
    with opened(tmp_path / "cache") as tier:
        tier.put([block(name) for name in "abcd"])
        damage(tmp_path / "cache", "c")
        tier.delete([key_of("a")])
        assert there(tier, "abcd") == "bd"
        assert tier.stats.corrupt == 1


def test_files_that_are_removed_under_the_tier_are_misses(tmp_path):
    with opened(tmp_path / "cache") as tier:
        tier.put([block("a"), block("b")])
        files(tmp_path / "cache")[0].unlink()
        assert there(tier, "ab") == ""
        assert tier.put([block("a")]) > 0
        assert there(tier, "ab") == "a"


def test_stats_count_hits_and_misses(tmp_path):
    with opened(tmp_path / "cache") as tier:
        tier.put([block("a"), block("b")])
        tier.get([key_of("a"), key_of("b")])
        tier.get([key_of("a"), key_of("z")])
        assert (tier.stats.hits, tier.stats.misses) == (3, 1)


def test_find_waits_for_no_write(tmp_path):
    class Slow(Calls):
        reached, go_on = threading.Event(), threading.Event()

        def fsync(self, fd):
            self.reached.set()
            assert self.go_on.wait(30)

    Slow.go_on.set()
    with opened(tmp_path / "cache", calls=Slow()) as tier:
        tier.put([block("a")])
        Slow.go_on.clear()
        Slow.reached.clear()
        writer = threading.Thread(target=tier.put, args=([block("b")],))
        writer.start()
        try:
            assert Slow.reached.wait(30)
            assert tier.find(key_of("a"))
            assert tier.find(key_of("b")) is None, "it is not durable yet"
        finally:
            Slow.go_on.set()
            writer.join(30)
        assert tier.find(key_of("b"))


def test_blocks_too_many_or_too_large_for_one_file_are_parted_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "MAX_SEGMENT_BYTES", 1000)
    names = [str(number) for number in range(100)]
    sizes = [(37 * number) % 1300 for number in range(100)]
    with opened(tmp_path / "cache") as tier:
        tier.put([block(name, size) for name, size in zip(names, sizes, strict=True)])
        assert [got.nbytes for got in tier.get([key_of(name) for name in names])] == sizes
        for file in tier._index.segments.values():
            payload = sum(record.nbytes for record in file.records.values())
            assert payload <= 1000 or len(file.records) == 1
