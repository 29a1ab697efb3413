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
        task = progress.add_task(what, total=None, amount="")
        yield lambda done, total: set_to(progress, task, what, done, total or None, in_bytes=True)


def bar() -> Progress:
    """A bar, gone when it ends."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.table import Column

    # The text takes what the others leave, and is cut to that.
    text = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
    amount = TextColumn("{task.fields[amount]}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(16), amount)
    return Progress(*columns, console=Console(stderr=True), transient=True, expand=True)


def set_to(progress: Progress, task: TaskID, text: str, done: int, total: int | None, in_bytes: bool) -> None:
    """Set a bar to `done` of `total`, which pulses while the total is not known."""
    amount = ""
    if in_bytes and (done or total):
        amount = f"{done / 1e6:,.1f} MB" if total is None else f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
    progress.tasks[0].total = total  # `update` takes None for no change
    progress.update(task, description=text, completed=done if total is not None else 0, amount=amount)


class Display:
    """Shows what a generation does before it has text."""

    def __init__(self) -> None:
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, update: Update) -> None:
        """Show an update, if stderr is a terminal."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            progress = bar()
            self._bar = progress, progress.add_task("", total=None, amount="")
            progress.start()
        set_to(*self._bar, update.message, update.done, update.total, update.unit == "bytes")

    def clear(self) -> None:
        """Leave the terminal to the text."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
