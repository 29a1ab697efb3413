"""The places for programs: how many run at once, and whose is next.

Guarantees:
    - One owner never has all places, however many programs it starts.
    - A place that gets free goes to the owner who has fewest; of programs of such owners, to that which came first.
    - Of programs that wait for other programs there are so few that these find a place.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Places:
    """`num` places, of which each owner has `num_of_one` at most. For one event loop."""

    def __init__(self, num: int) -> None:
        self.num, num_nesting = num, num // 2
        self.num_of_one = max(num - 1, num_nesting + 1)
        self.nesting = asyncio.Semaphore(num_nesting)  # for programs that wait for other programs
        self._taken: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []  # in the order in which they came

    def are_there(self, owner: str) -> bool:
        """Whether a program of an owner finds a place at once."""
        return self._taken.total() < self.num and self._taken[owner] < self.num_of_one

    def why_not(self, owner: str) -> str:
        """Why a program of an owner has to wait, in words."""
        if self._taken.total() < self.num:
            return f"{self._taken[owner]} of your programs run already"
        return f"{self.num} programs run already"

    @asynccontextmanager
    async def one(self, owner: str) -> AsyncIterator[None]:
        """A place for as long as the block lasts; waits for it."""
        given = asyncio.get_running_loop().create_future()
        self._waiting.append((owner, given))
        self._give()
        try:
            await given
        except asyncio.CancelledError:
            if given.cancelled():
                self._waiting.remove((owner, given))
            else:  # it was given meanwhile
                self._take_back(owner)
            raise
        try:
            yield
        finally:
            self._take_back(owner)

    def _take_back(self, owner: str) -> None:
        self._taken[owner] -= 1
        if not self._taken[owner]:
            del self._taken[owner]
        self._give()

    def _give(self) -> None:
        """Give free places to those who wait."""
        while could := [each for each in self._waiting if self.are_there(each[0]) and not each[1].cancelled()]:
            owner, given = chosen = min(could, key=lambda each: self._taken[each[0]])
            self._waiting.remove(chosen)
            self._taken[owner] += 1
            given.set_result(None)
