"""Reads files for callers: text, inside allowed folders and nowhere else. Knows nothing of models or the protocol."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_mcp.errors import InvalidRequest
from mlx_mcp.service.globs import Below, has_wildcards, matches

MAX_FILES = 64
MAX_TEXTS = 2_000  # files that one call may have read for a program
MAX_PATH_BYTES = 4096  # the work of resolving a path grows with the square of its length
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe would wait for its writer


@dataclass(frozen=True)
class Texts:
    """Files that were read: their texts by path below their root, and why those are left out that a pattern found."""

    files: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class FileReader:
    """Reads what lies inside `roots`; a link is followed if what it leads to lies there too."""

    def __init__(
        self,
        roots: tuple[Path, ...],
        max_file_bytes: int,
        max_total_bytes: int,
        max_texts_bytes: int = 64 << 20,
        why_none: str = "",
    ) -> None:
        """`why_none` is what callers are told where there are no roots; `max_texts_bytes` is the limit of `texts`."""
        self._roots = tuple(root.absolute() for root in roots)
        self._max_file_bytes, self._max_total_bytes, self._why_none = max_file_bytes, max_total_bytes, why_none
        self._max_texts_bytes = max_texts_bytes

    @classmethod
    def of_window(
        cls,
        roots: tuple[Path, ...] | None,
        folder: str | None,
        max_file_bytes: int,
        max_total_bytes: int,
        max_texts_bytes: int,
    ) -> FileReader:
        """The reader for a host that starts the server in `folder`: that is read unless `roots` were set."""
        why_none = ""
        if roots is None:
            roots = default_roots(folder)
            if folder is None:
                why_none = " The folder that it was started in is gone."
            elif not roots:
                why_none = (
                    f" It was started in {folder}, which is or holds your home folder: such a folder is never read."
                )
        return cls(roots, max_file_bytes, max_total_bytes, max_texts_bytes, why_none)

    def read(self, paths: list[str]) -> str:
        """The files as `<file path="…">` (relative to its root), their text, `</file>`; an empty line between two.

        Blocks: call it on a thread. A file that is given twice is shown once. A relative path is looked up in one root
        after the other; `..` goes up in the path as it is written, `~` and wildcards are names like any other.

        Raises:
            InvalidRequest: a path leads outside, nowhere, or to what is no text within the limits. Of what is outside
                the text does not tell whether it exists.
        """
        self._check_roots(paths)
        if len(paths) > MAX_FILES:
            raise InvalidRequest(f"{len(paths)} files are too many for a call: give at most {MAX_FILES}.")
        files: dict[Path, str] = {}
        total = 0
        for path in paths:
            fd, root, below = self._open(path)
            try:
                data = self._data(path, fd, self._max_file_bytes, "MLX_MCP_MAX_FILE_BYTES")
            finally:
                os.close(fd)
            if root / below in files:
                continue
            total += len(data)
            if total > self._max_total_bytes:
                raise InvalidRequest(
                    f"The files up to {shown(path)} have {total} bytes, and a call may have {self._max_total_bytes} "
                    "read. Give fewer, or have the server started with a larger MLX_MCP_MAX_FILES_BYTES."
                )
            files[root / below] = framed(str(below), decoded(path, data))
        return "\n\n".join(files.values())

    def texts(self, patterns: Sequence[str]) -> Texts:
        """The texts of files for a program, by path below their root; a pattern may have wildcards (see globs).

        Blocks: call it on a thread. Of what a pattern with wildcards finds, what is no text is left out, and a link
        that leads outside is not seen.

        Raises:
            InvalidRequest: as of `read`; a pattern finds nothing, or there are too many files or bytes.
        """
        self._check_roots(patterns)
        made, total, seen = Texts(), 0, set[Path]()
        for pattern in patterns:
            found = self._found(pattern)
            for path in found or [pattern]:
                fd, top, below = self._open(path)
                name = str(
                    top / below if str(below) in made.files else below
                )  # of two roots, each may have such a file
                try:
                    if top / below in seen:
                        continue
                    seen.add(top / below)
                    data = self._data(path, fd, self._max_texts_bytes, "MLX_MCP_MAX_SANDBOX_FILES_BYTES")
                    text = decoded(path, data)
                except InvalidRequest as error:
                    if not found:
                        raise
                    made.left_out[name] = str(error)
                    continue
                finally:
                    os.close(fd)
                total += len(text)
                if total > self._max_texts_bytes:
                    raise InvalidRequest(
                        f"The files up to {shown(path)} have more than {self._max_texts_bytes} characters, which is "
                        "what one call may have read. Give fewer, or have the server started with a larger "
                        "MLX_MCP_MAX_SANDBOX_FILES_BYTES."
                    )
                made.files[name] = text
                if len(made.files) > MAX_TEXTS:
                    raise InvalidRequest(f"These are more than {MAX_TEXTS} files: give fewer, or narrower patterns.")
        return made

    def _check_roots(self, paths: Sequence[str]) -> None:
        if paths and not self._roots:
            raise InvalidRequest(
                f"This server reads no files.{self._why_none} Give their text in the call, or have it started with "
                "MLX_MCP_FILE_ROOTS, the folders that it may read."
            )

    def _found(self, pattern: str) -> list[str]:
        """The paths of the files that a pattern finds; none where it has no wildcards or is a file's own name.

        Raises:
            InvalidRequest: it has wildcards, and there is no such file in any root.
        """
        parts = Path(pattern).parts
        first = next((at for at, part in enumerate(parts) if has_wildcards(part)), None)
        if first is None or "\0" in pattern:
            return []
        tops = self._tops()
        for root in self._roots:
            if os.path.lexists(root / pattern) and resolved(root / pattern).is_relative_to(root):
                return []
            folder = resolved(Path(os.path.normpath(root.joinpath(*parts[:first]))))
            top = next((top for top in tops if folder.is_relative_to(top)), None)
            if top is None or ".." in parts[first:]:
                continue
            under = folder.relative_to(top).parts

            def open_folder(below: Below, top: Path = top, under: Below = under) -> int:
                return open_below(top, (*under, *below), FOLDER)

            found = [str(folder.joinpath(*below)) for below in matches(open_folder, parts[first:])]
            inside = [path for path in found if any(resolved(Path(path)).is_relative_to(top) for top in tops)]
            if inside:
                return inside
        raise InvalidRequest(
            f"No file matches {shown(pattern)} in {', '.join(map(str, self._roots))}. Give another pattern, or the "
            "path; names that begin with a dot, and links to folders, are left out."
        )

    def _tops(self) -> list[Path]:
        """The roots; where one lies in another the outer one comes first, and every step from there is checked."""
        return sorted(map(resolved, self._roots), key=lambda root: len(root.parts))

    def _open(self, path: str) -> tuple[int, Path, Path]:
        """Open a file; returns its descriptor, the root that it is in, and its path below that."""
        try:
            if "\0" in path or len(os.fsencode(path)) > MAX_PATH_BYTES:
                raise ValueError
        except ValueError as error:  # half a surrogate is one, too
            raise InvalidRequest(f"{shown(path)} cannot be the path of a file: give another.") from error
        tops, inside = self._tops(), False
        for root in self._roots:
            # `..` is taken away first: what a link outside leads to must not decide where the path ends.
            real = resolved(Path(os.path.normpath(root / path)))
            top = next((top for top in tops if real.is_relative_to(top)), None)
            if top is None:
                continue
            inside, below = True, real.relative_to(top)
            try:
                return open_below(top, below.parts), top, below
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise unreadable(path, error) from error
        folders = ", ".join(map(str, self._roots))
        if not inside:
            raise InvalidRequest(
                f"{shown(path)} is outside the allowed folders ({folders}): give a path inside, or have the server "
                "started with MLX_MCP_FILE_ROOTS."
            )
        raise InvalidRequest(
            f"There is no file {shown(path)} in {folders}. Give a path relative to such a folder, or an absolute one; "
            "`~` and wildcards are not expanded."
        )

    def _data(self, path: str, fd: int, limit: int, setting: str) -> bytes:
        """The bytes of a file that was opened, if they are no more than the limit, which the setting is of."""
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            raise InvalidRequest(f"{shown(path)} is a folder: give the files in it, one by one.")
        if not stat.S_ISREG(info.st_mode):
            raise InvalidRequest(f"{shown(path)} is no regular file: give one that is.")
        if info.st_size <= limit:
            try:
                with open(fd, "rb", closefd=False) as file:
                    data = file.read(limit + 1)  # it may grow meanwhile
            except OSError as error:
                raise unreadable(path, error) from error
            if len(data) <= limit:
                return data
        raise InvalidRequest(
            f"{shown(path)} has more than {limit} bytes: give the part that matters in the call, or have the server "
            f"started with a larger {setting}."
        )


def resolved(path: Path) -> Path:
    """Where a path's links lead, as far as they can be followed."""
    try:
        return Path(os.path.realpath(path))
    except OSError:  # a link was taken away as it was read
        return path


def open_below(root: Path, names: tuple[str, ...], last: int = FILE) -> int:
    """A descriptor of root/names, in which no name is a link: whatever was put in its place since it was resolved."""
    fd = os.open(root, FOLDER)
    for at, name in enumerate(names, 1):
        folder = fd
        try:
            fd = os.open(name, last if at == len(names) else FOLDER, dir_fd=folder)
        finally:
            os.close(folder)
    return fd


def framed(path: str, text: str) -> str:
    """A file as a model sees it."""
    end = "" if text.endswith("\n") or not text else "\n"
    return f'<file path="{attribute(path)}">\n{text}{end}</file>'


def decoded(path: str, data: bytes) -> str:
    """A file's text, without a byte order mark."""
    try:
        text, at = data.decode(), data.find(0)
    except UnicodeDecodeError as error:
        text, at = "", error.start
    if at >= 0:
        raise InvalidRequest(
            f"{shown(path)} is no UTF-8 text: byte {at} is 0x{data[at]:02x}. Convert it, or give what matters in it in "
            "`prompt`."
        )
    return text.removeprefix("\ufeff")


def unreadable(path: str, error: OSError) -> InvalidRequest:
    """What a caller hears of a file inside a root that the system does not let us read."""
    return InvalidRequest(f"{shown(path)} cannot be read: {error.strerror}. Give another file.")


def shown(path: str) -> str:
    """A path as it was given, control characters escaped."""
    return f"{path[:200]!r}"


def attribute(path: str) -> str:
    """A path as it stands between quotes; control characters are escaped."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)
    return "".join(escaped).replace('"', "&quot;")


def default_roots(folder: str | None) -> tuple[Path, ...]:
    """What a host that starts the server lets it read: its project's folder, unless that holds the user's home.

    Desktop hosts start servers in `/`; there is none where the working directory is gone.
    """
    if folder is None:
        return ()
    project, home = resolved(Path(folder)), resolved(Path(os.path.expanduser("~")))
    return () if home.is_relative_to(project) else (project,)
