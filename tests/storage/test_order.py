"""The order of system calls on which everything else relies, call by call."""

import os

from mlx_mcp.storage.folder import Calls, Folder
from tests.storage.world import block, open_store, record


class Journal(Calls):
    """Notes what is done to which kind of file: a name that is made up is told by its beginning or end."""

    def __init__(self, path):
        self.path, self.done, self.names = path, [], {}

    def open(self, name, flags, dir_fd=None):
        fd = super().open(name, flags, dir_fd)
        self.names[fd] = kind(name)
        if flags & os.O_EXCL:
            self.done.append(f"make {kind(name)}")
        return fd

    def pwrite(self, fd, buffers, offset):
        self.done.append(f"write {self.names[fd]}")
        return super().pwrite(fd, buffers, offset)

    def fsync(self, fd):
        ours = os.path.samestat(os.fstat(fd), os.stat(self.path))
        self.done.append(f"sync {'folder' if ours else self.names.get(fd, 'parent')}")
        super().fsync(fd)

    def rename(self, old, new, dir_fd):
        self.done.append(f"rename {kind(old)} {kind(new)}")
        super().rename(old, new, dir_fd)

    def unlink(self, name, dir_fd):
        self.done.append(f"unlink {kind(name)}")
        super().unlink(name, dir_fd)

    def since(self, number):
        """What was done since so many calls, but for writing."""
        return [each for each in self.done[number:] if not each.startswith(("make", "write"))]


def kind(name):
    name = os.path.basename(name)
    return (
        "tmp"
        if name.startswith("tmp-")
        else name[name.index(".") :].replace(".safetensors", "")
        if "." in name[1:]
        else name
    )


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(tmp_path):
    journal = Journal(tmp_path / "cache")
    folder = Folder.open(journal.path, journal)
    journal.done.clear()
    folder.write("a", [(3, (b"end",)), (0, (b"two",))])
    assert journal.done == ["make tmp", "write tmp", "write tmp", "sync tmp", "rename tmp a", "sync folder"]
    folder.close()


def test_what_is_renamed_or_removed_is_synced_with_its_folder(tmp_path):
    journal = Journal(tmp_path / "cache")
    folder = Folder.open(journal.path, journal)
    for name in "ab":
        folder.write(name, [(0, (b"bytes",))])
    journal.done.clear()
    folder.rename("a", "c")
    folder.unlink(["b", "c"])
    assert journal.done == ["rename a c", "sync folder", "unlink b", "unlink c", "sync folder"]
    folder.close()


def test_a_new_folder_and_those_above_it_are_synced_before_anything_is_in_it(tmp_path):
    journal = Journal(tmp_path / "far" / "cache")
    Folder.open(journal.path, journal).close()
    first = next(at for at, done in enumerate(journal.done) if done.startswith("rename"))
    assert journal.done[:first].count("sync parent") >= 2


def test_a_session_is_written_after_its_blocks_and_both_before_that_is_told(tmp_path):
    journal = Journal(tmp_path / "cache")
    store = open_store(journal.path, calls=journal)
    blocks = [block("a"), block("tail")]
    before = len(journal.done)
    store.persist(blocks, record("s", blocks))
    saved = ["sync tmp", "rename tmp .blocks", "sync folder"] * 2 + ["sync tmp", "rename tmp .session", "sync folder"]
    assert journal.since(before)[: len(saved)] == saved
    store.close()


def test_a_session_has_ended_before_its_blocks_go(tmp_path):
    journal = Journal(tmp_path / "cache")
    store = open_store(journal.path, calls=journal)
    blocks = [block("a"), block("tail")]
    store.persist(blocks, record("s", blocks))
    before = len(journal.done)
    store.remove("s")
    gone = ["unlink .blocks", "sync folder"] * 2 + ["unlink .session.gone", "sync folder"]
    assert journal.since(before) == ["rename .session .session.gone", "sync folder", *gone]
    store.close()
