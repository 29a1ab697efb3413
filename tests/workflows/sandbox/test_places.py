"""Who gets a place for a program, and when."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from mlx_mcp.workflows.sandbox.places import Places


class Program:
    """A program of an owner: it runs from when it has a place until it is ended."""

    def __init__(self, places, owner, log):
        self.running, self.over = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self.run(places, owner, log))

    async def run(self, places, owner, log):
        async with places.one(owner):
            log.append(owner)
            self.running.set()
            await self.over.wait()

    async def end(self):
        self.over.set()
        await self.task


@pytest.fixture
async def house():
    programs, log = [], []

    async def start(places, *owners):
        programs.extend(Program(places, owner, log) for owner in owners)
        await asyncio.sleep(0.01)
        return programs[-len(owners) :]

    yield start, log
    for each in programs:
        each.task.cancel()
    await asyncio.gather(*(each.task for each in programs), return_exceptions=True)


async def test_one_owner_never_has_all_places(house):
    start, log = house
    places = Places(8)
    await start(places, *["they"] * 20)
    assert log == ["they"] * 7
    assert places.why_not("they") == "7 of your programs run already"
    await start(places, "me")
    assert log[-1] == "me"
    assert places.why_not("me") == "8 programs run already"


async def test_a_place_that_gets_free_goes_to_the_owner_who_has_fewest(house):
    start, log = house
    places = Places(4)
    first, second, _, _ = await start(places, "they", "they", "they", "me")
    _, _, we, _ = await start(places, "they", "they", "we", "me")
    for each in (first, we, second):
        each.over.set()
        await asyncio.sleep(0.01)
    assert log[4:] == ["we", "me", "they"]


async def test_a_program_that_gives_up_waiting_takes_no_place_and_holds_up_nobody(house):
    start, log = house
    places = Places(2)
    first, second = await start(places, "they", "me")
    waits, after = await start(places, "we", "us")
    waits.task.cancel()
    await first.end()
    await asyncio.sleep(0.01)
    assert log == ["they", "me", "us"]
    # The place comes at the moment in which the one that waits for it is cancelled.
    (late,) = await start(places, "we")
    second.over.set()
    await second.task
    late.task.cancel()
    await asyncio.gather(late.task, return_exceptions=True)
    await after.end()
    assert places.are_there("we")
    async with AsyncExitStack() as stack:
        for owner in ("me", "we"):
            async with asyncio.timeout(5):
                await stack.enter_async_context(places.one(owner))


@pytest.mark.parametrize("num", range(2, 9))
async def test_programs_that_wait_for_others_leave_their_owner_a_place(num):
    places = Places(num)
    async with AsyncExitStack() as stack:
        for _ in range(num // 2):
            await stack.enter_async_context(places.nesting)
            await stack.enter_async_context(places.one("they"))
        assert places.nesting.locked()
        assert places.are_there("they")
