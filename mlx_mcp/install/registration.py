"""A server's entry in a host's file: whether it is there, put in, and taken out, byte for byte where that can be."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mcp.errors import InstallError
from mlx_mcp.install.host_file import BY_HAND, HostFile, alone, missing_folders, read, remove_folders, replace
from mlx_mcp.install.hosts import Entry, Host
from mlx_mcp.install.record import Edit, Record, difference
from mlx_mcp.install.server import is_own
from mlx_mcp.install.texts import BrokenText, UnfitText, rest_of, same, value_at


@dataclass(frozen=True)
class Change:
    """What would be done to a file, and what has to be kept in mind of it; nothing was done yet."""

    file: Path
    before: bytes | None
    after: bytes | None  # None: there will be no file
    edit: Edit | None = None  # that puts the entry in
    undoes: tuple[Edit, ...] = ()  # edits that are history afterwards
    folders: tuple[Path, ...] = ()  # that may go with the file
    exact: bool = False  # an edit of ours is taken back as it was made

    def diff(self) -> str:
        """The change as a unified diff; empty if there is none."""
        one, other = ((data or b"").decode().splitlines(keepends=True) for data in (self.before, self.after))
        lines = difflib.unified_diff(one, other, str(self.file), str(self.file))
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


class Registration:
    """One server, by name, in one file of a host."""

    def __init__(self, host: Host, name: str, record: Record, project: Path | None = None) -> None:
        self.host, self.name, self.record = host, name, record
        self.file = host.file(project)
        self.language: Any = host.language(self.file)
        self.target = os.path.realpath(self.file)

    def current(self) -> Any:
        """What the file says of the server, None if nothing.

        Raises:
            InstallError: the file cannot be read.
        """
        return self.entry_in(read(self.file).text)

    def is_own(self, entry: Any) -> bool:
        """Whether an entry is this program's: it starts it, or was put in by it, or for it by the host's command."""
        text, edits = read(self.file).text, self.record.of(self.target, self.name)
        return is_own(entry) or any(each.undone(text) is not None or same(each.entry, entry) for each in edits)

    def install(self, entry: Entry, force: bool = False) -> Change:
        """What puts the entry in.

        Raises:
            InstallError: the file is broken or cannot be edited, or an entry of this name is another program's.
        """
        file = read(self.file)
        text = file.text
        current = self.entry_in(text)
        if same(current, entry):
            return Change(self.file, file.data, file.data)
        own = current is not None and self.is_own(current)
        if current is not None and not own and not force:
            raise InstallError(
                f"{self.file} has another {self.name!r} already. Choose a --name, or replace it with --force; "
                "`mlx-mcp uninstall` then puts it back."
            )
        # What was put in before is taken out first, so that the edit can be taken back to what was there without it.
        base, undone = self.without(text) if own else (text, None)
        after = self.edited(self.language.with_entry, base, self.host.path(self.name), entry)
        assert same(self.entry_in(after), entry), f"the entry is not in {self.file}"
        assert self.differs_by_entry(after, base), f"more than the entry would change in {self.file}"
        edit = Edit(
            self.target,
            self.name,
            *difference(base, after),
            created=undone.created if undone else file.data is None,
            folders=undone.folders if undone else self.folders(file),
        )
        return Change(self.file, file.data, file.bytes_of(after), edit, tuple(self.record.of(self.target, self.name)))

    def uninstall(self, force: bool = False) -> Change:
        """What takes the entry out, and leaves the file as it was before, as far as nobody has changed it there.

        Raises:
            InstallError: the file is broken or cannot be edited, or the entry is another program's.
        """
        file = read(self.file)
        text = file.text
        current, edits = self.entry_in(text), tuple(self.record.of(self.target, self.name))
        if current is None:
            return Change(self.file, file.data, file.data, None, edits, tuple(map(Path, self.folders(file))))
        if not force and not self.is_own(current):
            raise InstallError(
                f"{self.name!r} in {self.file} does not start mlx-mcp. Say with --name which server is meant, or "
                "remove this one with --force."
            )
        after, undone = self.without(text)
        gone = undone is not None and undone.created and not after
        folders = tuple(map(Path, undone.folders)) if undone and gone else ()
        data = None if gone else file.bytes_of(after)
        return Change(self.file, file.data, data, None, edits, folders, exact=undone is not None)

    def apply(self, change: Change) -> None:
        """Do it. The record is written before the file and cleared after it, so that a kill leaves no edit unknown.

        Raises:
            InstallError: the file cannot be written, or has changed meanwhile.
        """
        if change.before == change.after and not change.undoes:
            return
        with alone(self.record.lock):
            if change.edit:
                self.record.add(change.edit)
            try:
                if change.before != change.after:
                    replace(self.file, change.before, change.after)
            except InstallError:
                self.record.forget([change.edit] if change.edit else [])
                raise
            left = remove_folders(change.folders)
            self.record.forget([each for each in change.undoes if each != change.edit], left)

    def keep_in_mind(self, entry: Entry | None) -> None:
        """Record what the host's own command has put in, or, with None, that it has taken it out."""
        with alone(self.record.lock):
            self.record.forget(self.record.of(self.target, self.name))
            if entry is not None:
                self.record.add(Edit(self.target, self.name, "", "", entry=entry))

    def without(self, text: str) -> tuple[str, Edit | None]:
        """A text without our entry: by the edit that put it in, if that is still as it was, or else by its place."""
        for edit in self.record.of(self.target, self.name):
            before = edit.undone(text)
            if before is not None and self.differs_by_entry(before, text):
                return before, edit
        return self.edited(self.language.without_entry, text, self.host.path(self.name)), None

    def folders(self, file: HostFile) -> tuple[str, ...]:
        """The folders made for a file that is not there, also by a command that was killed; outermost first."""
        if file.data is not None:
            return ()
        made = {folder for edit in self.record.of(self.target, self.name) for folder in edit.folders}
        return tuple(sorted(made | set(map(str, missing_folders(self.file))), key=len))

    def differs_by_entry(self, one: str, other: str) -> bool:
        """Whether two texts, the first of which may be broken, say the same but for our entry."""
        path = self.host.path(self.name)
        try:
            return same(*(rest_of(self.language.load(text), path) for text in (one, other)))
        except BrokenText:  # what is around the entry has changed since
            return False

    def entry_in(self, text: str) -> Any:
        """What a text says of the server.

        Raises:
            InstallError: it is broken; the error says where.
        """
        return value_at(self.edited(self.language.load, text), self.host.path(self.name))

    def edited(self, work: Any, *arguments: Any) -> Any:
        """What work on the text comes to.

        Raises:
            InstallError: the text is broken or cannot be edited; it says which file, where, and what to do.
        """
        try:
            return work(*arguments)
        except BrokenText as error:
            raise InstallError(
                f"{self.file}, line {error.line}, column {error.column}: {error.what}. Nothing was changed. Correct "
                f"that, or {BY_HAND}"
            ) from error
        except UnfitText as error:
            raise InstallError(f"{self.file}: {error}. Nothing was changed; {BY_HAND}") from error


def whole_entry(host: Host, name: str, entry: Entry) -> str:
    """The entry alone, in the language of the host's file, to paste."""
    shown: str = host.language(Path(host.files[0])).dump(host.path(name), entry)
    return shown
