"""Limits what offloads write in a day, from midnight to midnight (UTC), so that they do not wear out an SSD."""

from __future__ import annotations

from collections.abc import Callable

DAY_S = 86400


class DailyBudget:
    """Counts the bytes that are written each day. `wall` returns the time since 1970 in seconds."""

    def __init__(self, daily_bytes: int, wall: Callable[[], float]) -> None:
        self._daily_bytes, self._wall = daily_bytes, wall
        self._day, self._written_bytes, self._offloaded_bytes = self._today(), 0, 0

    @property
    def written_bytes(self) -> int:
        """The bytes that were written today."""
        self._start_day_if_over()
        return self._written_bytes

    def allows(self, nbytes: int) -> bool:
        """Whether offloads may write so many more bytes today."""
        self._start_day_if_over()
        return self._offloaded_bytes + nbytes <= self._daily_bytes

    def count(self, nbytes: int) -> None:
        """Count bytes that were written."""
        self._start_day_if_over()
        self._written_bytes += nbytes

    def count_offload(self, nbytes: int) -> None:
        """Count bytes that an offload has written; `count` has counted them too."""
        self._offloaded_bytes += nbytes

    def count_earlier(self, nbytes: int, offload: bool, modified_at: float) -> None:
        """Count a file of an earlier run, if it was written today.

        Files that were evicted since are not counted, so the budget is approximate.
        """
        if modified_at // DAY_S == self._day:
            self._written_bytes += nbytes
            self._offloaded_bytes += nbytes if offload else 0

    def _today(self) -> int:
        return int(self._wall() // DAY_S)

    def _start_day_if_over(self) -> None:
        if self._today() != self._day:
            self._day, self._written_bytes, self._offloaded_bytes = self._today(), 0, 0
