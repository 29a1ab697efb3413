"""What may be written to disk in a day, from midnight to midnight (UTC), so that offloads do not wear out an SSD."""

from __future__ import annotations

from collections.abc import Callable

DAY_S = 86400


class DailyBudget:
    """Counts what is written; `wall` is the time of day, in seconds."""

    def __init__(self, daily_bytes: int, wall: Callable[[], float]) -> None:
        self._daily_bytes, self._wall = daily_bytes, wall
        self._day, self._written_bytes, self._offloaded_bytes = self._today(), 0, 0

    @property
    def written_bytes(self) -> int:
        """What was written today."""
        self._start_day_if_over()
        return self._written_bytes

    def allows(self, nbytes: int) -> bool:
        """Whether offloads may write so much more today."""
        self._start_day_if_over()
        return self._offloaded_bytes + nbytes <= self._daily_bytes

    def count(self, nbytes: int) -> None:
        """Charge today for what was written."""
        self._start_day_if_over()
        self._written_bytes += nbytes

    def count_offload(self, nbytes: int) -> None:
        """Charge today for what of it was an offload."""
        self._offloaded_bytes += nbytes

    def count_earlier(self, nbytes: int, offload: bool, modified_at: float) -> None:
        """Charge today for a file of an earlier run, if it was written today.

        What has been evicted since is forgotten: the budget is rough.
        """
        if modified_at // DAY_S == self._day:
            self._written_bytes += nbytes
            self._offloaded_bytes += nbytes if offload else 0

    def _today(self) -> int:
        return int(self._wall() // DAY_S)

    def _start_day_if_over(self) -> None:
        if self._today() != self._day:
            self._day, self._written_bytes, self._offloaded_bytes = self._today(), 0, 0
