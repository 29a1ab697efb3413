"""Durable sessions: what is kept of one, for how long, and what damage does."""

import errno
import os
from contextlib import contextmanager

import pytest

from mlx_mcp.errors import StorageError
from mlx_mcp.storage import session_log
from mlx_mcp.storage.folder import MAX_BAD_FILES, Calls, Folder
from mlx_mcp.storage.session_log import SessionLog
from tests.storage.world import T0, block, key_of, record

YEAR_S = 365 * 86400.0


@contextmanager
def opened(path, calls=None):
    folder = Folder.open(path, calls or Calls())
    yield SessionLog(folder)
    folder.close()


def manifests(path):
    return sorted(path.glob("*.session.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": "", "tokens": (), "num_kept": 0, "tools": (), "ttl_s": 3.5, "pinned": True},
        {"text": "\ud800 \x00 \N{SNOWMAN}", "tokens": (0, 2**32 - 1), "name": "../..", "model": "\u202e"},
        {"tools": ({"name": "f", "deep": [{"x": [None, True, 1.5, "\ud83d"]}]},), "parent_id": "p", "ephemeral": True},
    ],
)
def test_a_session_comes_back_as_it_was_saved(tmp_path, changes):
    saved = record("s", [block("a"), block("tail")], **changes)
    with opened(tmp_path / "cache") as log:
        log.save(saved)
        assert log.load("s") == saved
    with opened(tmp_path / "cache") as log:
        assert log.load("s") == saved
        [head] = log.heads()
        assert (head.session_id, head.num_tokens, head.tools) == ("s", len(saved.tokens), saved.tools)
        assert head.stored_bytes == manifests(tmp_path / "cache")[0].stat().st_size


def test_heads_are_read_without_tokens_or_text(tmp_path):
    class Counting(Calls):
        num_read = 0

        def pread(self, fd, nbytes, offset):
            self.num_read += nbytes
            return super().pread(fd, nbytes, offset)

    with opened(tmp_path / "cache") as log:
        log.save(record("s", [], text="long" * 1_000_000, tokens=tuple(range(100_000))))
    calls = Counting()
    with opened(tmp_path / "cache", calls) as log:
        assert [head.num_tokens for head in log.heads()] == [100_000]
    assert calls.num_read < 100_000


def test_versions_are_kept_side_by_side_and_each_replaces_itself(tmp_path):
    with opened(tmp_path / "cache") as log:
        log.save(record("s", [], text="one", version="before"))
        log.save(record("s", [], text="two"))
        log.save(record("s", [], text="three"))
        assert (log.load("s").text, log.load("s", "before").text, log.load("s", "other")) == ("three", "one", None)
        assert len(manifests(tmp_path / "cache")) == 2
        assert log.remove("s", "") == 1
        assert (log.load("s"), log.load("s", "before").text) == (None, "one")
        assert log.remove("s") == 1
        assert log.remove("s") == 0


def test_blocks_are_let_go_when_no_session_needs_them(tmp_path):
    def names(keys):
        return sorted(name for name in ("a", "b", "c", "d") if key_of(name) in keys)

    with opened(tmp_path / "cache") as log:
        log.save(record("s", [block("a"), block("b")]))
        log.save(record("fork", [block("a"), block("c")]))
        log.save(record("s", [block("a"), block("d")]))
        assert names(log.unneeded_blocks()) == ["b"]
        log.forget_unneeded()
        log.remove("fork")
        assert names(log.unneeded_blocks()) == ["c"]
        assert log.is_referenced(key_of("a"))
        log.remove("s")
        assert names(log.unneeded_blocks()) == ["a", "c", "d"]
        log.forget_unneeded()
        assert log.unneeded_blocks() == []
        assert not log.is_referenced(key_of("a"))


def test_what_was_let_go_is_known_after_a_restart(tmp_path):
    with opened(tmp_path / "cache") as log:
        log.save(record("s", [block("a"), block("b")]))
        log.save(record("s", [block("a"), block("c")]))
        log.save(record("other", [block("d")]))
        log.remove("other")
    with opened(tmp_path / "cache") as log:
        assert sorted(log.unneeded_blocks()) == sorted([key_of("b"), key_of("d")])
        assert [head.session_id for head in log.heads()] == ["s"]


def test_names_tell_nothing_and_follow_from_the_folders_key(tmp_path):
    names = set()
    for folder in ("one", "two"):
        with opened(tmp_path / folder) as log:
            log.save(record("../evil\x00", [], tenant="a/b"))
        [file] = manifests(tmp_path / folder)
        names.add(file.name)
    assert len(names) == 2
    assert all(name.removesuffix(".session.safetensors").isalnum() for name in names)


def test_a_damaged_session_is_set_aside_and_the_others_stay(tmp_path):
    with opened(tmp_path / "cache") as log:
        log.save(record("s", []))
        [file] = manifests(tmp_path / "cache")
        log.save(record("other", []))
    data = file.read_bytes()
    file.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    with opened(tmp_path / "cache") as log:
        assert [head.session_id for head in log.heads()] == ["other"]
        assert log.num_damaged == 1
        assert file.with_name(file.name + ".bad").exists()
        log.save(record("s", [], text="anew"))
    with opened(tmp_path / "cache") as log:
        assert log.load("s").text == "anew"
        assert log.num_damaged == 0


def test_a_session_whose_tokens_are_damaged_is_none(tmp_path):
    with opened(tmp_path / "cache") as log:
        log.save(record("s", [], text="the end"))
        [file] = manifests(tmp_path / "cache")
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        assert log.load("s") is None
        assert (log.num_damaged, log.heads()) == (1, [])


def test_of_damaged_files_so_many_are_kept(tmp_path):
    with opened(tmp_path / "cache") as log:
        for number in range(40):
            log.save(record(f"s{number}", []))
    for file in manifests(tmp_path / "cache"):
        file.write_bytes(b"damaged")
    with opened(tmp_path / "cache") as log:
        assert log.num_damaged == 40
    assert len(list((tmp_path / "cache").glob("*.bad"))) == MAX_BAD_FILES


def test_a_session_file_under_anothers_name_is_no_session(tmp_path):
    with opened(tmp_path / "cache") as log:
        log.save(record("s", []))
        [mine] = manifests(tmp_path / "cache")
        log.save(record("other", []))
        [other] = set(manifests(tmp_path / "cache")) - {mine}
    other.write_bytes(mine.read_bytes())
    with opened(tmp_path / "cache") as log:
        assert [head.session_id for head in log.heads()] == ["s"]
        assert log.num_damaged == 1


class FailingFolderSync(Calls):
    """Fails the second sync from now: the folder's, once the file has its name."""

    left = 0

    def fsync(self, fd):
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_when_nobody_knows_which_of_two_states_is_durable_both_keep_their_blocks(tmp_path):
    calls = FailingFolderSync()
    with opened(tmp_path / "cache", calls) as log:
        log.save(record("s", [block("old")], text="old"))
        calls.left = 2
        with pytest.raises(StorageError, match="The disk reports an error"):
            log.save(record("s", [block("new")], text="new"))
        assert log.load("s").text == "new", "that is what is in the folder"
        assert log.is_referenced(key_of("old"))
        assert log.is_referenced(key_of("new"))


def test_a_session_that_could_not_be_saved_is_not_there(tmp_path):
    calls = FailingFolderSync()
    with opened(tmp_path / "cache", calls) as log:
        calls.left = 1
        with pytest.raises(StorageError, match="The disk reports an error"):
            log.save(record("s", []))
        assert (log.heads(), log.num_damaged) == ([], 0)


def test_a_session_larger_than_any_is_refused_with_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(session_log, "MAX_TOKENS", 3)
    with opened(tmp_path / "cache") as log:
        with pytest.raises(
            StorageError, match=r"has 4 tokens .* at most 3 .* can be kept on disk\. Go on in a new session"
        ):
            log.save(record("s", [], tokens=(1, 2, 3, 4)))
        log.save(record("s", [], tokens=(1, 2, 3)))


def test_sessions_end_when_their_ttl_is_over(tmp_path):
    with opened(tmp_path / "cache") as log:
        log.save(record("short", [], ttl_s=60.0))
        log.save(record("long", [], ttl_s=600.0))
        log.save(record("for ever", []))
        assert log.expired(T0 + 60) == []
        assert [head.session_id for head in log.expired(T0 + 61)] == ["short"]
        assert sorted(head.session_id for head in log.expired(T0 + 601)) == ["long", "short"]


@pytest.mark.parametrize("jump_s", [10 * YEAR_S, -10 * YEAR_S])
def test_a_clock_that_jumps_ends_no_session_early_whether_it_stays_wrong_or_is_set_right(tmp_path, jump_s):
    with opened(tmp_path / "cache") as log:
        log.save(record("s", [], ttl_s=86400.0))
        for minute in range(600):
            assert log.expired(T0 + jump_s + 60 * minute) == []
        log.save(record("saved meanwhile", [], ttl_s=86400.0, saved_at=T0 + jump_s, used_at=T0 + jump_s))
    with opened(tmp_path / "cache") as log:
        assert log.expired(T0 + jump_s) == []
    with opened(tmp_path / "cache") as log:
        for minute in range(600):
            assert log.expired(T0 + 60 * minute) == []


@pytest.mark.parametrize("jump_s", [0.0, 10 * YEAR_S, -10 * YEAR_S])
def test_after_a_jump_sessions_still_end_in_time(tmp_path, jump_s):
    with opened(tmp_path / "cache") as log:
        log.save(record("s", [], ttl_s=86400.0))
        log.expired(T0 + jump_s)
        ended = next(minute for minute in range(3000) if log.expired(T0 + jump_s + 60 * minute))
        assert 1380 <= ended <= 1441  # minutes of a day, or one hour less


def test_the_time_that_the_server_was_off_counts_up_to_thirty_days(tmp_path):
    with opened(tmp_path / "cache") as log:
        log.save(record("s", [], ttl_s=86400.0))
    with opened(tmp_path / "cache") as log:
        assert log.expired(T0 + 31 * 86400) == []
    with opened(tmp_path / "cache") as log:
        assert [head.session_id for head in log.expired(T0 + 7 * 86400)] == ["s"]


def test_time_without_use_before_saving_counts(tmp_path):
    with opened(tmp_path / "cache") as log:
        log.save(record("s", [], ttl_s=60.0, saved_at=T0, used_at=T0 - 50))
        assert [head.session_id for head in log.expired(T0 + 11)] == ["s"]
