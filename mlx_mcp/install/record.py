"""What was changed in hosts' files, so that it can be taken back byte for byte: kept in the state folder.

Of a file only that is kept which an edit put in and took out, never what else it says. No copy is left beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from mlx_mcp.errors import InstallError
from mlx_mcp.install.host_file import read, replace

KEPT = "registrations.json"


@dataclass(frozen=True)
class Edit:
    """One piece of a text in the place of another; and what had to be made for it."""

    file: str  # with links resolved
    name: str
    removed: str
    inserted: str
    created: bool = False  # there was no file
    folders: tuple[str, ...] = ()  # that were made for it, outermost first
    entry: dict[str, Any] | None = None  # what a host's own command has put in; then there is no piece of text

    def undone(self, text: str) -> str | None:
        """The text before the edit; None if what it put in is not there exactly once."""
        if not self.inserted or text.count(self.inserted) != 1:
            return None
        return text.replace(self.inserted, self.removed)


def difference(before: str, after: str) -> tuple[str, str]:
    """The piece that was taken out of a text, and the one that was put in its place."""
    shorter = min(len(before), len(after))
    start = next((at for at in range(shorter) if before[at] != after[at]), shorter)
    room = shorter - start
    end = next((at for at in range(room) if before[-1 - at] != after[-1 - at]), room)
    return before[start : len(before) - end], after[start : len(after) - end]


class Record:
    """All edits that were made and not yet taken back, the oldest first."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / KEPT
        self.lock = folder / "registrations.lock"

    def edits(self) -> list[Edit]:
        """What is kept.

        Raises:
            InstallError: the record is damaged.
        """
        data = read(self.file).data
        if data is None:
            return []
        try:
            kept: list[dict[str, Any]] = json.loads(data)["edits"]
            return [Edit(**{**each, "folders": tuple(each["folders"])}) for each in kept]
        except (ValueError, TypeError, KeyError) as error:
            raise InstallError(
                f"{self.file} is damaged. Remove it: entries are then taken out one by one, and files that were empty "
                "before may stay."
            ) from error

    def of(self, file: str, name: str) -> list[Edit]:
        """Those of one server in one file, the newest first."""
        return [each for each in reversed(self.edits()) if (each.file, each.name) == (file, name)]

    def add(self, edit: Edit) -> None:
        """Keep one more, on disk when this returns; called before the file is changed."""
        self.keep([*self.edits(), edit])

    def forget(self, gone: Sequence[Edit], folders: Sequence[Path] = ()) -> None:
        """Keep these no longer; called when the file is changed.

        Folders that were made for it and are still needed go with the files in them, if an edit made those, too.
        """
        edits = [each for each in self.edits() if each not in gone]
        for folder in reversed(folders):
            for place, edit in enumerate(edits):
                if edit.created and edit.folders and Path(edit.folders[0]).parent == folder:
                    edits[place] = replace_fields(edit, folders=(str(folder), *edit.folders))
                    break
                if edit.created and not edit.folders and Path(edit.file).parent == folder:
                    edits[place] = replace_fields(edit, folders=(str(folder),))
                    break
        self.keep(edits)

    def keep(self, edits: list[Edit]) -> None:
        """Keep these and no others; no file stays for none."""
        before = read(self.file).data
        after = json.dumps({"edits": [asdict(each) for each in edits]}, indent=1).encode() if edits else None
        if after != before:
            replace(self.file, before, after)
