"""What one connection's callers are doing, how far each generation is, and how all of it is cut off."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio

from mlx_mcp.chat.answer import TextKind
from mlx_mcp.engine.requests import Delta, Progress
from mlx_mcp.errors import CapacityError, GenerationFailed

PROGRESS_CHARS = 160  # hosts cut the message at 200
CLOSED_RETRY_S = 10.0
CUT_OFF = (
    "The server was stopped before this call had ended, and gives calls no more time (setting shutdown_timeout_s). A "
    "turn that was cut off leaves its session as it was. Call again."
)


@dataclass(eq=False)
class Meter:
    """How far one generation is."""

    done: int = 0  # tokens read and generated
    total: int | None = None
    line: str = ""  # what it does
    deltas: list[Delta] = field(default_factory=list)  # its thoughts, answer and tool calls
    read: int = 0  # tokens of the prompt
    ended: bool = False
    phase: str = "queued"  # as of Progress; "decode" once there is text

    @property
    def text(self) -> str:
        """Its answer so far, without thoughts and tool calls."""
        return "".join(delta.text for delta in self.deltas if delta.kind is TextKind.ANSWER)

    @property
    def end(self) -> str:
        """The last characters that it wrote, of whatever kind."""
        end, latest = "", reversed(self.deltas)
        while len(end) < PROGRESS_CHARS and (delta := next(latest, None)) is not None:
            end = delta.text + end
        return end[-PROGRESS_CHARS:]

    def take(self, update: Progress | Delta) -> None:
        """Take an update."""
        if isinstance(update, Delta):
            self.done, self.phase = self.read + update.num_tokens, "decode"
            self.deltas.append(update)
        else:
            self.line, self.phase = update.message, update.phase
            if update.unit == "tokens":  # bytes are told in words: what hosts are told must never go down
                self.done, self.total = update.done, update.total
            if update.phase == "prefill":
                self.read = update.done


def progress_line(meters: Sequence[Meter]) -> str:
    """How far generations are, in words."""
    if not meters:
        return "started"
    first = meters[0]
    if len(meters) == 1:
        return first.end or first.line
    line = f"{sum(meter.ended for meter in meters)} of {len(meters)} done"
    return f"{line}; {first.line}" if first.total is None and not first.ended else line  # it loads the model


# Awaited whenever something has come of a call, with how far each of its generations is, or its load.
Report = Callable[[Sequence[Meter]], Awaitable[None]]


@dataclass
class Activity:
    """What one connection's callers are doing, and with which sessions."""

    calls: dict[int, Meter] = field(default_factory=dict)  # generations, in order of arrival
    sessions: set[str] = field(default_factory=set)  # handles; some may have ended
    closed: bool = False  # whether further calls are refused
    _scopes: set[anyio.CancelScope] = field(default_factory=set)

    @property
    def busy(self) -> bool:
        """Whether a tool runs."""
        return bool(self._scopes)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """A tool that runs until the end of the block, or until it is cut off.

        Raises:
            CapacityError: the server takes no call any more.
            GenerationFailed: it was cut off.
        """
        if self.closed:
            raise CapacityError("The server is shutting down.", CLOSED_RETRY_S)
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.remove(scope)
        if scope.cancelled_caught:
            raise GenerationFailed(CUT_OFF)

    def cut_off(self) -> None:
        """End whatever runs with an error that says why."""
        for scope in self._scopes:
            scope.cancel()

    @contextmanager
    def watching(self, meter: Meter) -> Iterator[None]:
        """A generation that goes on until the end of the block."""
        self.calls[id(meter)] = meter
        try:
            yield
        finally:
            del self.calls[id(meter)]
