"""What commands print: tables that fit a terminal, and JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

GAP = 2
NARROWEST = 8  # what is left of a column that is cut


@dataclass(frozen=True)
class Column:
    """A column: one that is `whole` is neither cut nor dropped; of the others those of high `rank` go first."""

    title: str
    whole: bool = False
    rank: int = 0


def show_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: cut to fit a terminal, unless its whole columns alone take more; as it is where no terminal is."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in table(columns, rows, width, "…" if encodes("…") else "..."):
        typer.echo(line)


def show_json(value: Any) -> None:
    """Print a value as JSON, indented."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=not encodes("…")))


def show_marked(mark: str, color: str, text: str) -> None:
    """Print a line that begins with a mark, which has a colour where the user wants colours."""
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    typer.echo(f"{typer.style(f'{mark:5}', fg=color) if colored else f'{mark:5}'} {text}")


def encodes(text: str) -> bool:
    """Whether stdout can show it as it is."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None, cut_mark: str) -> list[str]:
    """The lines of a table that is at most `width` cells wide, as far as its whole columns allow that."""
    cells = [[column.title for column in columns], *([printable(cell) for cell in row] for row in rows)]
    widths = {at: max(length(row[at]) for row in cells) for at in range(len(columns))}
    if width is not None:
        # What says nothing in any row takes no room.
        widths = {at: cells_wide for at, cells_wide in widths.items() if any(row[at] for row in cells[1:]) or not rows}
        widths = fitted(columns, widths, width)
    lines = []
    for row in cells:
        shown = [cut(row[at], wide, cut_mark) for at, wide in widths.items()]
        padded = [text + " " * (wide - length(text)) for text, wide in zip(shown, widths.values(), strict=True)]
        lines.append((" " * GAP).join(padded).rstrip())
    return lines


def fitted(columns: Sequence[Column], widths: dict[int, int], width: int) -> dict[int, int]:
    """Which columns are shown, and how wide."""
    kept = dict(widths)
    while True:
        soft = sorted((at for at in kept if not columns[at].whole), key=lambda at: columns[at].rank)
        room = width - GAP * (len(kept) - 1) - sum(kept[at] for at in kept if columns[at].whole)
        least = {at: min(kept[at], max(NARROWEST, length(columns[at].title))) for at in soft}
        if not soft or sum(least.values()) <= room:
            break
        del kept[soft[-1]]
    room -= sum(least.values())
    for at in soft:
        more = min(room, kept[at] - least[at])
        kept[at], room = least[at] + more, room - more
    return kept


def printable(text: str) -> str:
    """A cell's text in one line, in which nothing speaks to the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text).strip()


def length(text: str) -> int:
    """How many cells of a terminal it takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def cut(text: str, width: int, mark: str) -> str:
    """What of a text fits, with a mark where something is missing."""
    if length(text) <= width:
        return text
    while text and length(text) + length(mark) > width:
        text = text[:-1]
    return text.rstrip() + mark
