"""Reading and writing by hand, so that a test decides when a disk is done."""

from collections.abc import Callable
from typing import Any, TypeVar

from mlx_mcp.errors import MlxMcpError

T = TypeVar("T")


class HandIo:
    """Does what the engine gave it when it is told to."""

    def __init__(self) -> None:
        self.work: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self.closed = False

    def submit(self, work: Callable[[], T], tell: Callable[[T | MlxMcpError], None], urgent: bool = False) -> None:
        self.work.insert(0, (work, tell)) if urgent else self.work.append((work, tell))

    def run(self) -> Callable[[], None]:
        """Do one piece; returns what tells the engine."""
        work, tell = self.work.pop(0)
        try:
            outcome: Any = work()
        except MlxMcpError as error:
            outcome = error
        return lambda: tell(outcome)

    def close(self, last: Callable[[], None], timeout_s: float) -> bool:
        while self.work:
            self.run()
        last()
        self.closed = True
        return True

    def run_all(self) -> None:
        """Do everything there is, and what comes of it."""
        while self.work:
            self.run()()
