"""The system refuses one call, each in turn, or all from one on: a typed error, and nothing that was kept is lost."""

import errno
import os
import resource
import shutil

import pytest

from mlx_mcp.errors import StorageError
from mlx_mcp.storage.folder import Calls, Folder
from mlx_mcp.storage.transfer import from_file, to_file
from tests.storage.world import Op, State, block, check_folder, check_session, open_store, perform, record, scratch

BEFORE = [Op("offload", "b0", 2), Op("persist", "b0", 2), Op("persist", "b1", 1)]
BEFORE += [Op("persist", "a0", 1), Op("persist", "a1", 2), Op("persist", "a0", 1, "kept"), Op("offload", "a1", 3)]
OPS = {
    "persist": Op("persist", "b1", 2),
    "persist what was offloaded": Op("persist", "a1", 3),
    "load": Op("load", "a1", 2),
    "remove": Op("remove", "b0"),  # from a file that it shares
    "remove two versions": Op("remove", "a0"),
    "offload": Op("offload", "b1", 2),
}
CALLS = {  # of which each was the one to fail
    "persist": {"open", "pwrite", "fsync", "rename", "unlink"},
    "offload": {"open", "pwrite", "fsync", "rename"},
    "load": {"open", "pread"},
    "remove": {"open", "pread", "pwrite", "fsync", "rename", "unlink"},
}
ERRNOS = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO]
TIGHT_BYTES = 12_800  # so that a persist has to evict


class Failing(Calls):
    """Fails the Nth call from now, or all from then on; of a write that fails a part may be done."""

    def __init__(self):
        self.disarm()

    def arm(self, nth, error, lasting):
        self.left, self.error, self.lasting, self.failed = nth, error, lasting, None

    def disarm(self):
        self.arm(-1, 0, False)

    def _call(self, name):
        self.left -= 1
        if self.left == 0 or (self.lasting and self.left < 0 and self.failed):
            self.failed = self.failed or name
            raise OSError(self.error, os.strerror(self.error))

    def open(self, name, flags, dir_fd=None):
        self._call("open")
        return super().open(name, flags, dir_fd)

    def mkdir(self, path):
        self._call("mkdir")
        super().mkdir(path)

    def pwrite(self, fd, buffers, offset):
        data = b"".join(buffers)
        try:
            self._call("pwrite")
        except OSError:
            super().pwrite(fd, [data[: len(data) // 3]], offset)
            raise
        return super().pwrite(fd, [data[: len(data) // 2 + 1]], offset)

    def pread(self, fd, nbytes, offset):
        self._call("pread")
        return super().pread(fd, nbytes, offset)

    def fsync(self, fd):
        self._call("fsync")
        super().fsync(fd)

    def rename(self, old, new, dir_fd):
        self._call("rename")
        super().rename(old, new, dir_fd)

    def unlink(self, name, dir_fd):
        self._call("unlink")
        super().unlink(name, dir_fd)


@pytest.fixture(scope="module")
def prepared():
    """A folder in which sessions share a file with each other and with offloaded blocks, and what it should hold."""
    with scratch() as parent:
        state = State()
        store = open_store(parent / "cache", quota_bytes=10**9)
        for op in BEFORE:
            perform(store, op)
            state = state.after(op)
        store.close()
        yield parent / "cache", state


def sessions_in(store):
    """What can be loaded; a session whose removal failed may be listed still."""
    found = {(head.session_id, head.version) for head in store.sessions.heads()}
    turns = {at: check_session(store, *at) for at in sorted(found)}
    return {at: turn for at, turn in turns.items() if turn is not None}


def check_error(exc, error):
    """It is the system's, and names a next step."""
    assert exc.__cause__.errno == error
    assert "cache folder" in str(exc)
    assert any(step in str(exc) for step in ("Free", "Check", "Raise"))


WAYS = [(errno.ENOSPC, False), (errno.EIO, False), (errno.EIO, True)]
WAYS += [pytest.param(error, False, marks=pytest.mark.slow) for error in (errno.EDQUOT, errno.EFBIG)]  # like ENOSPC


@pytest.mark.long
@pytest.mark.parametrize(("error", "lasting"), WAYS)
@pytest.mark.parametrize("quota_bytes", [10**9, TIGHT_BYTES], ids=["roomy", "tight"])
@pytest.mark.parametrize("what", OPS)
def test_whichever_call_fails_the_error_is_typed_and_the_earlier_state_whole(
    prepared, what, error, lasting, quota_bytes
):
    op = OPS[what]
    failed_calls = set()
    nth, more = 0, True
    while more:
        nth += 1
        with scratch() as parent:
            path, before = parent / "cache", prepared[1]
            shutil.copytree(prepared[0], path)
            path.chmod(0o700)
            calls = Failing()
            store = open_store(path, quota_bytes=quota_bytes, calls=calls)
            calls.arm(nth, error, lasting)
            try:
                perform(store, op)
                states = [before.after(op), *([before] if op.kind == "offload" else [])]
            except StorageError as exc:
                check_error(exc, error)
                states = [*before.during(op), before.after_refusing(op)]
            except AssertionError:
                assert op.kind == "load", "only what is loaded may be missing, and just now"
                states = [before]
            failed, more = calls.failed, calls.failed is not None
            failed_calls.add(failed)
            calls.disarm()
            if failed not in ("open", "pread"):  # what could not be read is missing until the next start
                assert sessions_in(store) in [state.sessions for state in states]
            again = Op("persist", "a1", 2, "later")
            perform(store, again)
            assert check_session(store, "a1", "later") == 2
            store.close()
            check_folder(path, [state.after(again) for state in states])
    assert failed_calls >= CALLS[op.kind]


@pytest.mark.parametrize("error", ERRNOS, ids=[errno.errorcode[number] for number in ERRNOS])
def test_whichever_call_of_the_start_fails_the_folder_is_refused_or_opened_whole(prepared, error):
    nth, calls = 0, None
    while calls is None or calls.failed is not None:
        nth += 1
        with scratch() as parent:
            path = parent / "cache"
            shutil.copytree(prepared[0], path)
            path.chmod(0o700)
            (path / "tmp-1-0123456789abcdef").write_bytes(b"half")
            calls = Failing()
            calls.arm(nth, error, lasting=False)
            try:
                open_store(path, calls=calls).close()
            except StorageError as exc:
                check_error(exc, error)
            assert check_folder(path, [prepared[1]]).sessions == prepared[1].sessions
    assert nth > 20


@pytest.mark.parametrize("error", ERRNOS, ids=[errno.errorcode[number] for number in ERRNOS])
def test_whichever_call_of_the_first_start_fails_the_next_start_works(error):
    nth, calls = 0, None
    while calls is None or calls.failed is not None:
        nth += 1
        with scratch() as parent:
            calls = Failing()
            calls.arm(nth, error, lasting=False)
            try:
                open_store(parent / "deep" / "cache", calls=calls).close()
            except StorageError as exc:
                check_error(exc, error)
            check_folder(parent / "deep" / "cache", [State()])
    assert nth > 10


def test_whichever_step_of_the_start_fails_is_named():
    told, nth, calls = [], 0, None
    while calls is None or calls.failed is not None:
        nth += 1
        with scratch() as parent:
            calls = Failing()
            calls.arm(nth, errno.EIO, lasting=False)
            try:
                open_store(parent / "cache", calls=calls).close()
            except StorageError as exc:
                told.append(str(exc))
    for step in (
        "Opening the cache folder",
        "Opening the lock of the cache folder",
        "Removing files of the cache folder",
        "Making the cache folder",
        "Writing to the cache folder",
    ):
        assert [text for text in told if text.startswith(step)], told


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (errno.ENOSPC, "The disk is full. Free some space"),
        (errno.EDQUOT, "Your disk quota is used up. Free some space"),
        (errno.EFBIG, "Files of this size are not allowed. Raise the limit"),
        (errno.EROFS, "The disk is read-only. Mount it writable"),
        (errno.EACCES, "It is not writable for you. Fix its permissions"),
        (errno.EPERM, "It is not writable for you. Fix its permissions"),
        (errno.ENOENT, "Check the path."),
        (errno.ELOOP, "Check the path; symbolic links are not followed"),
        (errno.EIO, "The disk reports an error. Check it"),
        (errno.EBADF, "Check the cache folder, or choose another"),
    ],
)
def test_each_error_of_the_system_is_told_with_what_helps_against_it(error, step):
    with scratch() as parent:
        calls = Failing()
        folder = Folder.open(parent / "cache", calls)
        folder.write("a", [(0, (b"x",))])
        for work, what in (
            (lambda: folder.write("b", [(0, (b"x",))]), "Writing to the cache folder failed"),
            (lambda: folder.rename("a", "b"), "Renaming a file of the cache folder failed"),
            (lambda: folder.unlink(["a"]), "Removing files of the cache folder failed"),
        ):
            calls.arm(1, error, lasting=True)
            if error == errno.ENOENT:  # a file that is gone is no error, but a folder is
                calls.arm(2, error, lasting=True)
            with pytest.raises(StorageError) as told:
                work()
            calls.disarm()
            assert str(told.value).startswith(what)
            assert step in str(told.value)
        folder.close()


def test_a_file_that_cannot_be_read_when_room_is_made_is_told(tmp_path):
    calls = Failing()
    store = open_store(tmp_path / "cache", calls=calls, quota_bytes=16_000)
    needed, other, tail = block("needed", 4000), block("other", 4000), block("tail", 100)
    store.persist([needed, other, tail], record("s", [needed, tail]))
    calls.arm(1, errno.EIO, lasting=False)
    with pytest.raises(StorageError, match=r"Reading a file of the cache folder failed: .*The disk reports an error"):
        store.tier.put([block("new", 6000)])
    calls.disarm()
    assert store.sessions.load("s") is not None
    store.close()


def test_an_export_or_import_that_the_disk_stops_is_told_with_the_next_step(tmp_path):
    class Full(Failing):
        full = False

        def pwrite(self, fd, buffers, offset):
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().pwrite(fd, buffers, offset)

    calls = Full()
    store = open_store(tmp_path / "cache", calls=calls)
    perform(store, Op("persist", "a0", 1))
    calls.full = True
    with pytest.raises(StorageError, match=r"Writing out failed: .*Make room, or choose another place for it"):
        store.export("a0", "", to_file(tmp_path / "out"))
    calls.full = False
    store.export("a0", "", to_file(tmp_path / "out"))
    calls.arm(1, errno.EIO, lasting=True)
    with pytest.raises(StorageError, match=r"Reading .*out failed: .*Export it again"):
        store.import_(from_file(tmp_path / "out"))
    calls.disarm()
    store.close()


def test_a_sync_that_failed_is_not_tried_again_on_the_same_file():
    """The kernel may report an error once and drop the pages: a second fsync that succeeds proves nothing."""

    class Lying(Calls):
        synced, failing = (), False

        def fsync(self, fd):
            self.synced += (os.fstat(fd).st_ino,)
            if self.failing:
                self.failing = False
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    with scratch() as parent:
        calls = Lying()
        store = open_store(parent / "cache", calls=calls)
        calls.synced, calls.failing = (), True
        with pytest.raises(StorageError, match="The disk reports an error"):
            perform(store, Op("persist", "a0", 1))
        perform(store, Op("persist", "a0", 1))
        assert calls.synced.count(calls.synced[0]) == 1
        store.close()


def test_a_limit_on_the_size_of_files_is_a_typed_error_and_lifting_it_is_enough():
    with scratch() as parent:
        store = open_store(parent / "cache", quota_bytes=10**9)
        perform(store, Op("persist", "a0", 1))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        large = block("large", 1_000_000)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            with pytest.raises(
                StorageError, match=r"Files of this size are not allowed\. Raise the limit \(ulimit -f\)"
            ):
                store.persist([large], record("s", [large]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sessions_in(store) == {("a0", ""): 1}
        store.persist([large], record("s", [large]))
        store.close()
