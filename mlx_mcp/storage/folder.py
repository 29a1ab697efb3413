"""The cache folder: who may open it, and how a file is written into it durably. Knows nothing of the files' content.

Guarantees:
- Only one process has a folder open. It holds a lock as long as it lives. (A forked child shares the lock: never fork.)
- A file under its final name is whole. It is written under another name in the same folder, synced, and renamed.
- When `write`, `rename` or `unlink` returns, its effect survives a power cut. When it raises, the old file is there, or
  (if the very last step failed) the new file is, whole.
- No symbolic link is followed, and no file is read that another user or another name could change.

The folder is flat, so that syncing it once makes every rename and unlink before that durable.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from mlx_mcp.errors import FolderInUse, StorageError

LOCK, TMP, BAD = "lock", "tmp-", ".bad"
MAX_BAD_FILES = 16
KEYS = ("key", "key.copy")  # two: without its key everything in the folder is lost
KEY_BYTES, CHECK_BYTES = 32, 8
MAX_BUFFERS = 512  # in one call; Linux and macOS allow 1024

Buffer = bytes | memoryview
Piece = tuple[int, Seq[Buffer]]  # an offset in the file, and the buffers that are written there one after another

_REMEDIES = {
    errno.ENOSPC: "The disk is full. Free some space, or lower the limit on cached bytes.",
    errno.EDQUOT: "Your disk quota is used up. Free some space, or lower the limit on cached bytes.",
    errno.EFBIG: "Files of this size are not allowed. Raise the limit (ulimit -f), or choose another cache folder.",
    errno.EROFS: "The disk is read-only. Mount it writable, or choose another cache folder.",
    errno.EACCES: "It is not writable for you. Fix its permissions, or choose another cache folder.",
    errno.EPERM: "It is not writable for you. Fix its permissions, or choose another cache folder.",
    errno.ENOENT: "Check the path.",
    errno.ELOOP: "Check the path; symbolic links are not followed.",
    errno.EIO: "The disk reports an error. Check it (its log, its health), or choose another cache folder.",
}


def storage_error(exc: OSError, what: str) -> StorageError:
    """The error to raise for a system call's error. It names what failed, and the next step."""
    remedy = _REMEDIES.get(exc.errno or 0, "Check the cache folder, or choose another.")
    return StorageError(f"{what} failed: {exc.strerror or exc}. {remedy}")


class Calls:
    """The system calls that this layer makes. Tests record them, or have one fail or write only a part."""

    def open(self, name: str | Path, flags: int, dir_fd: int | None = None) -> int:
        """Open a file, in a folder if one is given. Follows no symbolic link. A new file has mode 0600."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        """Close a file or folder."""
        os.close(fd)

    def mkdir(self, path: Path) -> None:
        """Make a folder of mode 0700."""
        os.mkdir(path, 0o700)

    def pwrite(self, fd: int, buffers: Seq[Buffer], offset: int) -> int:
        """Write buffers one after another, or a first part of them; returns the bytes written."""
        return os.pwritev(fd, buffers, offset)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        """Read at most so many bytes."""
        return os.pread(fd, nbytes, offset)

    def fsync(self, fd: int) -> None:
        """Make what was written to a file, or renamed in a folder, survive a power cut."""
        if hasattr(fcntl, "F_FULLFSYNC"):  # on macOS fsync leaves bytes in the drive's cache
            try:
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                return
            except OSError as exc:
                if exc.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):  # network disks know fsync only
                    raise
        os.fsync(fd)

    def rename(self, old: str, new: str, dir_fd: int) -> None:
        """Rename a file in its folder, in place of any other file of that name."""
        os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def unlink(self, name: str, dir_fd: int) -> None:
        """Remove a name from a folder."""
        os.unlink(name, dir_fd=dir_fd)


@dataclass(frozen=True)
class OpenFile:
    """A file that is open for reading."""

    calls: Calls
    fd: int
    nbytes: int
    modified_at: float

    def read(self, nbytes: int, offset: int) -> bytes:
        """Read bytes from an offset on; returns fewer only at the end of the file."""
        data = self.calls.pread(self.fd, nbytes, offset)
        while 0 < len(data) < nbytes:
            more = self.calls.pread(self.fd, nbytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


@contextlib.contextmanager
def reading(calls: Calls, name: str | Path, dir_fd: int | None = None) -> Iterator[OpenFile]:
    """Open a regular file for reading, whoever owns it. Never waits.

    Raises:
        OSError: there is no such file, or it cannot be opened.
    """
    # O_NONBLOCK: opening a FIFO would wait for somebody to write to it.
    fd = calls.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd)
    try:
        yield opened(calls, fd)
    finally:
        calls.close(fd)


def opened(calls: Calls, fd: int) -> OpenFile:
    """The file that was opened as `fd`.

    Raises:
        OSError: it is not a regular file.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return OpenFile(calls, fd, found.st_size, found.st_mtime)


def write_durably(calls: Calls, dir_fd: int, name: str, pieces: Iterable[Piece]) -> int:
    """Write pieces to a file of that name so that it survives a power cut; returns its size. `pieces` may be lazy.

    Raises:
        OSError: a call failed, and the effects of the earlier ones are undone as far as possible. After a failed fsync
            nobody knows what is on the disk, and another fsync would not tell. So the file is removed.
    """
    tmp = f"{TMP}{os.getpid()}-{secrets.token_hex(8)}"
    end = 0
    fd = calls.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd)
    try:
        try:
            for offset, buffers in pieces:
                end = max(end, _write_all(calls, fd, buffers, offset))
            calls.fsync(fd)
        finally:
            calls.close(fd)
        calls.rename(tmp, name, dir_fd)
    except BaseException:
        with contextlib.suppress(OSError):
            calls.unlink(tmp, dir_fd)
        raise
    calls.fsync(dir_fd)
    return end


def _write_all(calls: Calls, fd: int, buffers: Seq[Buffer], offset: int) -> int:
    """Write all of some buffers, even if the system writes only parts of them; returns the offset of their end."""
    left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    left.reverse()
    while left:
        written = calls.pwrite(fd, left[: -MAX_BUFFERS - 1 : -1], offset)
        if written <= 0:
            raise OSError(errno.EIO, "nothing was written")
        offset += written
        while left and written >= left[-1].nbytes:
            written -= left.pop().nbytes
        if written:
            left[-1] = left[-1][written:]
    return offset


class Folder:
    """A locked folder, and the key with which its files are sealed."""

    def __init__(self, path: Path, fd: int, lock_fd: int, calls: Calls) -> None:
        self.path, self.calls = path, calls
        self._fd, self._lock_fd = fd, lock_fd
        self.key = b""

    @classmethod
    def open(cls, path: Path, calls: Calls) -> Folder:
        """Make the folder if it is missing, lock it, and remove files that a killed process has written in part.

        Raises:
            FolderInUse: another process has the folder open.
            StorageError: the folder cannot be used, or is not safe to use.
        """
        try:
            _make(calls, path)
            fd = calls.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                raise StorageError(
                    f"{path} is a symbolic link or no folder. Name the folder itself as cache folder."
                ) from exc
            raise storage_error(exc, f"Opening the cache folder {path}") from exc
        try:
            _check(path, os.fstat(fd))
            folder = cls(path, fd, _lock(calls, path, fd), calls)
        except BaseException:
            calls.close(fd)
            raise
        try:
            folder._recover()
        except BaseException:
            folder.close()
            raise
        return folder

    def _recover(self) -> None:
        names = self.names()
        self.unlink([name for name in names if name.startswith(TMP)])  # syncs: what is found here is durable
        found = {name: self._read_key(name) for name in KEYS if name in names}
        sound = [key for key in found.values() if key]
        if sound:
            self.key = sound[0]
        else:  # the first start, or everything in the folder is a miss
            try:
                _sync_parents(self.calls, self.path)
            except OSError as exc:
                raise storage_error(exc, "Making the cache folder") from exc
            self.key = secrets.token_bytes(KEY_BYTES)
        for name in KEYS:
            if found.get(name) != self.key:
                self.write(name, [(0, (self.key, _check_of(self.key)))])

    def _read_key(self, name: str) -> bytes | None:
        """Read a copy of the key; returns None if it is damaged.

        Raises:
            StorageError: it cannot be read now.
        """
        try:
            with self.reading(name) as file:
                said = file.read(KEY_BYTES + CHECK_BYTES, 0)
        except OSError as exc:
            raise storage_error(exc, "Reading the cache folder's key") from exc
        key = said[:KEY_BYTES]
        return key if said[KEY_BYTES:] == _check_of(key) else None

    def close(self) -> None:
        """Release the folder, so that another process can open it."""
        self.calls.close(self._lock_fd)
        self.calls.close(self._fd)

    def names(self) -> list[str]:
        """The names of all files.

        Raises:
            StorageError: the folder cannot be read.
        """
        try:
            return os.listdir(self._fd)
        except OSError as exc:
            raise storage_error(exc, "Listing the cache folder") from exc

    def modified_at(self, name: str) -> float:
        """When a file was last written, in seconds; 0 for one that is gone."""
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mtime
        except OSError:
            return 0.0

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[OpenFile]:
        """Open a file for reading that nobody else could have changed.

        Raises:
            OSError: there is no such file, or it has another owner or another name too.
        """
        with reading(self.calls, name, self._fd) as file:
            found = os.fstat(file.fd)
            if found.st_nlink != 1 or found.st_uid != os.geteuid():
                raise OSError(errno.EPERM, "it has another name, or another owner")
            yield file

    def write(self, name: str, pieces: Iterable[Piece]) -> int:
        """Make or replace a file durably; returns its size in bytes.

        Raises:
            StorageError: it failed. The file is the old one, or the whole new one.
        """
        try:
            return write_durably(self.calls, self._fd, name, pieces)
        except OSError as exc:
            raise storage_error(exc, "Writing to the cache folder") from exc

    def rename(self, old: str, new: str) -> None:
        """Rename a file durably. It is no error if the file is gone, or was renamed before.

        Raises:
            StorageError: it failed. The file has its old name, or the new one.
        """
        try:
            with contextlib.suppress(FileNotFoundError):
                self.calls.rename(old, new, self._fd)
            self.calls.fsync(self._fd)
        except OSError as exc:
            raise storage_error(exc, "Renaming a file of the cache folder") from exc

    def unlink(self, names: Iterable[str]) -> None:
        """Remove files durably. It is no error if some are gone already.

        Raises:
            StorageError: some are still there.
        """
        try:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self.calls.unlink(name, self._fd)
            self.calls.fsync(self._fd)
        except OSError as exc:
            raise storage_error(exc, "Removing files of the cache folder") from exc


def set_aside(folder: Folder, name: str) -> None:
    """Rename a damaged file that cannot be made again, and remove the oldest of these files if there are many."""
    try:
        folder.rename(name, name + BAD)
        bad = sorted((name for name in folder.names() if name.endswith(BAD)), key=folder.modified_at)
        folder.unlink(bad[:-MAX_BAD_FILES])
    except StorageError:  # it will be met again at the next start
        return


def _check_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()[:CHECK_BYTES]


def _make(calls: Calls, path: Path) -> None:
    """Make a folder, and the missing folders above it."""
    for missing in reversed([one for one in (path, *path.parents) if not os.path.lexists(one)]):
        with contextlib.suppress(FileExistsError):  # another process makes it too
            calls.mkdir(missing)


class ReadOnlyFolder(Folder):
    """A folder that another process may have open. It is read as it is now, and nothing in it is changed."""

    @classmethod
    def open(cls, path: Path, calls: Calls) -> ReadOnlyFolder:
        """Open a folder for reading.

        Raises:
            StorageError: there is no such folder, or it cannot be read.
        """
        try:
            folder = cls(path, calls.open(path, os.O_RDONLY | os.O_DIRECTORY), -1, calls)
        except OSError as exc:
            raise storage_error(exc, f"Opening the cache folder {path}") from exc
        keys = (folder._read_key(name) for name in KEYS if name in folder.names())
        folder.key = next((key for key in keys if key), b"")
        return folder

    def rename(self, old: str, new: str) -> None:
        """Do nothing: only the owner sets damaged files aside."""

    def unlink(self, names: Iterable[str]) -> None:
        """Do nothing: only the owner removes files."""

    def close(self) -> None:
        """Close the folder."""
        self.calls.close(self._fd)


def _sync_parents(calls: Calls, path: Path) -> None:
    """Make a folder, and those above it, survive a power cut."""
    for parent in path.absolute().parents:
        if not os.access(parent, os.W_OK):  # we can have made nothing in there
            return
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            calls.fsync(fd)
        finally:
            calls.close(fd)


def _check(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise StorageError(f"The cache folder {path} belongs to another user. Choose another cache folder.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise StorageError(
            f"Others may read or write the cache folder {path}. Run `chmod 700 {path}`, or choose another cache folder."
        )


def _lock(calls: Calls, path: Path, dir_fd: int) -> int:
    """Take the folder's lock, and write into it who has it; returns the descriptor that holds it."""
    try:
        fd = calls.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, dir_fd)
    except OSError as exc:
        raise storage_error(exc, f"Opening the lock of the cache folder {path}") from exc
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise StorageError(f"{path / LOCK} is no plain file. Remove it, or choose another cache folder.")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, and nobody learns whose it is
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {time.time():.0f}\n".encode(), 0)
    except BlockingIOError as exc:
        owner = re.fullmatch(rb"(\d{1,18}) (\d{1,18})\n", os.pread(fd, 64, 0))
        calls.close(fd)
        raise FolderInUse(str(path), int(owner[1]) if owner else 0, int(owner[2]) if owner else 0) from exc
    except OSError as exc:
        calls.close(fd)
        raise storage_error(exc, f"Locking the cache folder {path}") from exc
    except BaseException:
        calls.close(fd)
        raise
    return fd
