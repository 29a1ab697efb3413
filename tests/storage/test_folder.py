"""Who may open a cache folder, and what is trusted in one."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_mcp.errors import FolderInUse, StorageError
from mlx_mcp.storage.folder import Calls, Folder

ROOT = Path(__file__).parents[2]


def open_and_close(path):
    """The folder's key."""
    folder = Folder.open(path, Calls())
    folder.close()
    return folder.key


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_new_folder_and_its_files_are_their_users_alone(tmp_path):
    previous = os.umask(0)
    try:
        folder = Folder.open(tmp_path / "far" / "away" / "cache", Calls())
        folder.write("a", [(0, (b"bytes",))])
        folder.close()
    finally:
        os.umask(previous)
    assert mode(tmp_path / "far" / "away" / "cache") == 0o700
    assert {mode(file) for file in (tmp_path / "far" / "away" / "cache").iterdir()} == {0o600}


def test_the_key_is_made_once(tmp_path):
    first = open_and_close(tmp_path / "cache")
    assert len(first) == 32
    assert open_and_close(tmp_path / "cache") == first
    assert open_and_close(tmp_path / "other") != first


@pytest.mark.parametrize("name", ["key", "key.copy"])
def test_damage_to_one_copy_of_the_key_costs_nothing(tmp_path, name):
    key = open_and_close(tmp_path / "cache")
    file = tmp_path / "cache" / name
    whole = file.read_bytes()
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for data in [*damaged, *(whole[:end] for end in range(len(whole)))]:
        file.write_bytes(data)
        assert open_and_close(tmp_path / "cache") == key
        assert file.read_bytes() == whole
    file.unlink()
    assert open_and_close(tmp_path / "cache") == key
    assert file.read_bytes() == whole


def test_without_a_sound_copy_the_key_is_made_anew(tmp_path):
    key = open_and_close(tmp_path / "cache")
    for name in ("key", "key.copy"):
        (tmp_path / "cache" / name).write_bytes(b"damaged")
    new = open_and_close(tmp_path / "cache")
    assert len(new) == 32
    assert new != key


def test_a_second_process_is_told_who_owns_the_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from mlx_mcp.storage.folder import Calls, Folder\n"
        f"folder = Folder.open(Path({str(tmp_path / 'cache')!r}), Calls()); print('open', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert owner.stdout.readline() == b"open\n"
        with pytest.raises(FolderInUse, match=f"pid {owner.pid}.*stop that process") as refused:
            open_and_close(tmp_path / "cache")
        assert refused.value.pid == owner.pid
        assert abs(refused.value.started_at - time.time()) < 60
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate(timeout=60)
    open_and_close(tmp_path / "cache")


@pytest.mark.parametrize("said", [b"", b"junk", b"12", b"-1 x\n", b"9" * 64])
def test_a_lock_that_says_nothing_still_locks(tmp_path, said):
    owner = Folder.open(tmp_path / "cache", Calls())
    (tmp_path / "cache" / "lock").write_bytes(said)
    with pytest.raises(FolderInUse, match="another process\\. ") as refused:
        open_and_close(tmp_path / "cache")
    assert refused.value.pid == 0
    owner.close()


def test_a_symbolic_link_is_not_followed_to_a_folder(tmp_path):
    (tmp_path / "victim").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="Name the folder itself"):
        open_and_close(tmp_path / "cache")
    assert list((tmp_path / "victim").iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "cache").write_bytes(b"mine")
    with pytest.raises(StorageError, match="Name the folder itself"):
        open_and_close(tmp_path / "cache")


def test_a_folder_that_others_may_write_to_is_refused(tmp_path):
    open_and_close(tmp_path / "cache")
    (tmp_path / "cache").chmod(0o770)
    with pytest.raises(StorageError, match=r"Others may read or write the cache folder .*chmod 700"):
        open_and_close(tmp_path / "cache")


def test_another_users_folder_is_refused(tmp_path, monkeypatch):
    open_and_close(tmp_path / "cache")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StorageError, match="belongs to another user"):
        open_and_close(tmp_path / "cache")


@pytest.mark.parametrize("name", ["lock", "key", "key.copy"])
@pytest.mark.parametrize("plant", ["symlink", "hardlink", "fifo", "folder"])
def test_what_is_planted_for_the_lock_or_key_is_refused_and_its_target_unchanged(tmp_path, name, plant):
    open_and_close(tmp_path / "cache")
    (tmp_path / "cache" / name).unlink()
    (tmp_path / "victim").write_bytes(b"mine")
    match plant:
        case "symlink":
            (tmp_path / "cache" / name).symlink_to(tmp_path / "victim")
        case "hardlink":
            os.link(tmp_path / "victim", tmp_path / "cache" / name)
        case "fifo":
            os.mkfifo(tmp_path / "cache" / name)
        case "folder":
            (tmp_path / "cache" / name).mkdir()
    told = "lock" if name == "lock" else "Reading the cache folder's key failed: "
    with pytest.raises(StorageError, match=told):
        open_and_close(tmp_path / "cache")
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_a_lock_that_is_no_plain_file_is_named_with_what_to_do(tmp_path):
    open_and_close(tmp_path / "cache")
    (tmp_path / "cache" / "lock").unlink()
    os.mkfifo(tmp_path / "cache" / "lock")
    with pytest.raises(StorageError, match=r"lock is no plain file\. Remove it, or choose another"):
        open_and_close(tmp_path / "cache")


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        (fcntl, "flock", "Locking the cache folder"),  # as on a file system over the network that has no locks
        (os, "listdir", "Listing the cache folder"),
    ],
)
def test_a_folder_that_the_system_does_not_lock_or_list_is_told(tmp_path, monkeypatch, module, name, words):
    open_and_close(tmp_path / "cache")

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module, name, refuse)
    with pytest.raises(StorageError, match=f"{words}.* failed: No locks available. Check the cache folder"):
        open_and_close(tmp_path / "cache")
    monkeypatch.undo()
    open_and_close(tmp_path / "cache")


def test_a_symbolic_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    folder = Folder.open(tmp_path / "cache", Calls())
    (tmp_path / "cache" / "a").symlink_to(tmp_path / "victim")
    folder.write("a", [(0, (b"new",))])
    folder.close()
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert (tmp_path / "cache" / "a").read_bytes() == b"new"


def test_leftovers_of_a_killed_process_are_cleared_away_and_only_by_the_owner(tmp_path):
    owner = Folder.open(tmp_path / "cache", Calls())
    leftover = tmp_path / "cache" / "tmp-123-0123456789abcdef"
    leftover.write_bytes(b"half")
    with pytest.raises(FolderInUse):
        open_and_close(tmp_path / "cache")
    assert leftover.exists()
    owner.close()
    open_and_close(tmp_path / "cache")
    assert not leftover.exists()


def test_buffers_are_laid_end_to_end_however_short_the_writes_are(tmp_path):
    class Stingy(Calls):
        def pwrite(self, fd, buffers, offset):
            return super().pwrite(fd, [memoryview(b"".join(buffers))[:7]], offset)

    parts = [bytes([n]) * (n % 5) for n in range(100)]
    folder = Folder.open(tmp_path / "cache", Stingy())
    assert folder.write("a", [(3, parts), (0, (b"abc",))]) == 3 + len(b"".join(parts))
    folder.close()
    assert (tmp_path / "cache" / "a").read_bytes() == b"abc" + b"".join(parts)


def test_more_buffers_than_one_call_takes_are_written(tmp_path):
    folder = Folder.open(tmp_path / "cache", Calls())
    parts = [bytes([n % 256]) for n in range(3000)]
    folder.write("a", [(0, parts)])
    folder.close()
    assert (tmp_path / "cache" / "a").read_bytes() == b"".join(parts)


def test_a_write_that_writes_nothing_is_an_error(tmp_path):
    class Stuck(Calls):
        stuck = False

        def pwrite(self, fd, buffers, offset):
            return 0 if self.stuck else super().pwrite(fd, buffers, offset)

    calls = Stuck()
    folder = Folder.open(tmp_path / "cache", calls)
    calls.stuck = True
    with pytest.raises(StorageError, match="nothing was written"):
        folder.write("a", [(0, (b"bytes",))])
    assert not (tmp_path / "cache" / "a").exists()
    folder.close()
