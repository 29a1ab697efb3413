"""Reading and writing by hand, so that a test decides when a disk is done."""

from collections.abc import Callable
from typing import Any, TypeVar

from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.results import ThreadResult
from mlx_mcp.errors import MlxMcpError

T = TypeVar("T")


class HandIo:
    """Does what the engine gave it when it is told to."""

    def __init__(self) -> None:
        self.work: list[tuple[Callable[[], Any], Callable[[Any], ThreadResult]]] = []
        self.engine: Engine | None = None  # whom results go to
        self.closed = False
        self.num_background = 0  # the last pieces of the work, which others pass

    def submit(
        self,
        work: Callable[[], T],
        result: Callable[[T | MlxMcpError], ThreadResult],
        urgent: bool = False,
        background: bool = False,
    ) -> None:
        self.num_background += background
        at = 0 if urgent else len(self.work) + 1 if background else len(self.work) - self.num_background
        self.work.insert(at, (work, result))

    def run_others(self) -> None:
        while len(self.work) > self.num_background:
            self.run()()

    def do(self) -> ThreadResult:
        """Do one piece; returns what came of it."""
        self.num_background -= len(self.work) == self.num_background
        work, result = self.work.pop(0)
        try:
            outcome: Any = work()
        except MlxMcpError as error:
            outcome = error
        return result(outcome)

    def run(self) -> Callable[[], None]:
        """Do one piece; returns what tells the engine."""
        result, engine = self.do(), self.engine
        assert engine is not None, "nobody to tell"
        return lambda: engine.handle(result)

    def close(self, last: Callable[[], None], timeout_s: float) -> bool:
        while self.work:
            self.do()
        last()
        self.closed = True
        return True

    def run_all(self) -> None:
        """Do everything there is, and what comes of it."""
        while self.work:
            self.run()()
