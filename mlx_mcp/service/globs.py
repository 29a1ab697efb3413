"""Which files below a folder match a pattern with wildcards. Follows no link to a folder; leaves out what is hidden.

A pattern is a path whose parts may have `*`, `?` and `[…]`; the part `**` stands for any number of folders, none too.
Only a part that itself begins with a dot matches a name that does.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from mlx_mcp.errors import InvalidRequest

MAX_SEEN = 100_000  # names that are looked at for one pattern
ANY = "**"
Below = tuple[str, ...]  # the names that lead from a folder to something below it


def has_wildcards(part: str) -> bool:
    """Whether a part of a path is a pattern."""
    return any(char in part for char in "*?[")


def matches(open_folder: Callable[[Below], int], parts: Sequence[str]) -> Iterator[Below]:
    """The files that match the parts of a pattern, links to files among them; folder by folder, each in order.

    `open_folder` gives a descriptor of a folder below, which is closed here. Folders that cannot be read are left out.

    Raises:
        InvalidRequest: there are too many names to look through.
    """
    wanted = [*parts, "*"] if parts[-1] == ANY else list(parts)
    tests = [re.compile(fnmatch.translate(part)).match for part in wanted]
    folders: list[tuple[Below, frozenset[int]]] = [((), frozenset([0]))]
    num_seen = 0
    while folders:
        below, reached = folders.pop()
        places = with_skipped(wanted, reached)
        deeper = []
        for name, is_folder in entries(open_folder, below):
            num_seen += 1
            if num_seen > MAX_SEEN:
                raise InvalidRequest(
                    f"{'/'.join(parts)[:200]!r} has more than {MAX_SEEN} names to look through: begin the pattern with "
                    "a folder, or name the files."
                )
            shown = [at for at in places if not name.startswith(".") or wanted[at].startswith(".")]
            hit = [at for at in shown if wanted[at] != ANY and tests[at](name)]
            if is_folder:
                on = {at + 1 for at in hit if at + 1 < len(wanted)} | {at for at in shown if wanted[at] == ANY}
                deeper += [((*below, name), frozenset(on))] if on else []
            elif len(wanted) - 1 in hit:
                yield (*below, name)
        folders += reversed(deeper)


def with_skipped(wanted: Sequence[str], reached: frozenset[int]) -> list[int]:
    """The parts of a pattern that a name may match: those that were reached, and what comes after each `**`."""
    places = set(reached)
    for at in sorted(reached):
        while wanted[at] == ANY:
            at += 1
            places.add(at)
    return sorted(places)


def entries(open_folder: Callable[[Below], int], below: Below) -> list[tuple[str, bool]]:
    """The names in a folder, in order, and which of them are folders; none if it cannot be read."""
    with suppress(OSError):
        fd = open_folder(below)
        try:
            with os.scandir(fd) as found:
                return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
        finally:
            os.close(fd)
    return []
