"""Bars on stderr, while a terminal is there to see them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from mlx_mcp.engine.requests import Progress as Update


@contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """What takes how many of how many bytes are done, and shows that; the bar goes with the block."""
    with bar() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def bar() -> Progress:
    """A bar of bytes, gone when it ends."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

    text = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True)
    return Progress(SpinnerColumn(), text, BarColumn(20), DownloadColumn(), console=console, transient=True)


class Display:
    """Shows what a generation does before it has text: a bar while bytes are counted, else a line."""

    def __init__(self) -> None:
        self._bytes: Progress | None = None
        self._task: TaskID | None = None
        self._text = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, update: Update) -> None:
        """Show an update, if stderr is a terminal."""
        if not sys.stderr.isatty():
            return
        if self._bytes is None or self._task is None:
            self._bytes = bar()
            self._bytes.start()
            self._task = self._bytes.add_task(update.message, total=None)
        in_bytes = update.unit == "bytes" and bool(update.total)
        self._bytes.update(
            self._task,
            description=update.message,
            completed=update.done if in_bytes else 0,
            total=update.total if in_bytes else None,
        )

    def clear(self) -> None:
        """Leave the terminal to the text."""
        if self._bytes is not None:
            self._bytes.stop()
            self._bytes = None
