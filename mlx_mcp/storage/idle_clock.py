"""The clock by which idle time on disk is measured. Knows no files.

It follows the wall clock, but never goes back, and advances by an hour at most from one reading to the next. The time
between two processes counts too, unless it is over 30 days. So a wall clock that jumps by years costs nothing more than
an hour of its TTL.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

MAX_STEP_S = 3600.0
MAX_OFF_S = 30 * 86400.0


class IdleClock:
    """A clock that begins where the latest of the `saved_at` times of what is on disk left it."""

    def __init__(self, saved_at: Iterable[float]) -> None:
        self._clock = max(saved_at, default=-math.inf)
        self._wall: float | None = None  # the wall clock at its latest reading

    def look_at(self, wall: float) -> float:
        """Advance by a reading of the wall clock, in seconds; returns the time by this clock."""
        if self._wall is not None:
            self._clock += min(max(0.0, wall - self._wall), MAX_STEP_S)
        elif self._clock == -math.inf or 0.0 <= wall - self._clock <= MAX_OFF_S:
            self._clock = wall
        self._wall = wall
        return self._clock
