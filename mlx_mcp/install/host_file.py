"""A host's file as bytes: read, and replaced so that a kill leaves the old or the new one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_mcp.errors import InstallError
from mlx_mcp.install.texts import place_of

BOM = b"\xef\xbb\xbf"
BY_HAND = "edit it by hand: `mlx-mcp install --print` shows the entry."
NEW_MODE = 0o600  # an entry may have secrets in its environment


@dataclass(frozen=True)
class HostFile:
    """What was read of a file; `data` is None if there is none."""

    path: Path
    data: bytes | None

    @property
    def text(self) -> str:
        """What it says, without a byte order mark; nothing if there is no file.

        Raises:
            InstallError: it is not UTF-8.
        """
        data = (self.data or b"").removeprefix(BOM)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            line, column = place_of(data[: error.start].decode(errors="replace"), error.start)
            raise InstallError(
                f"{self.path} is not UTF-8 (line {line}, column {column}). Save it as UTF-8, or {BY_HAND}"
            ) from error

    def bytes_of(self, text: str) -> bytes:
        """A text as this file would have it, with the byte order mark that it had."""
        return (BOM if (self.data or b"").startswith(BOM) else b"") + text.encode()


def read(path: Path) -> HostFile:
    """Read a file, through links.

    Raises:
        InstallError: it cannot be read.
    """
    try:
        return HostFile(path, path.read_bytes())
    except FileNotFoundError:
        return HostFile(path, None)
    except OSError as error:
        raise failed(path, error) from error


def missing_folders(path: Path) -> list[Path]:
    """The folders that would have to be made for a file, outermost first."""
    target = Path(os.path.realpath(path))
    return [each for each in reversed(target.parents) if not each.exists()]


def replace(path: Path, before: bytes | None, after: bytes | None) -> None:
    """Have a file say something else, or be gone (None); a kill at any point leaves the old or the new one.

    What a symbolic link leads to is replaced, and the link stays. The file keeps its mode. One caller at a time.

    Raises:
        InstallError: it is read-only, cannot be written, or no longer says what it did before.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if before is not None else NEW_MODE
        if not mode & 0o222:
            raise InstallError(f"{path} is read-only. Make it writable (chmod u+w), or {BY_HAND}")
        if read(target).data != before:
            raise InstallError(f"{path} has changed meanwhile. Run the command again.")
        if after is None:
            target.unlink()
        else:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.mlx-mcp")
            temporary.unlink(missing_ok=True)  # one that a kill left
            try:
                written(temporary, after, mode, target)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        synced(target.parent)
    except OSError as error:
        raise failed(path, error) from error


def written(path: Path, data: bytes, mode: int, like: Path) -> None:
    """Make a file that is on disk when this returns; it belongs to whom the other one does, where that may be."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, NEW_MODE)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        if like.exists():
            with suppress(PermissionError):
                os.fchown(fd, like.stat().st_uid, like.stat().st_gid)
        os.fchmod(fd, mode)
        os.fsync(fd)


def synced(folder: Path) -> None:
    """Return when the names in a folder are on disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_folders(folders: Sequence[Path]) -> list[Path]:
    """Remove folders that are empty, given outermost first; returns the others."""
    left: list[Path] = []
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # something is in it
            left.insert(0, folder)
    return left


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes out of the block that take the same lock."""
    import fcntl

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def failed(path: Path, error: OSError) -> InstallError:
    """What a system error means for whoever runs the command."""
    return InstallError(f"{path} cannot be read or written ({error.strerror}). Correct that, or {BY_HAND}")
