"""What a principal may use, with a clock of the test's own; and that whatever is refused has cost nothing."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mcp.core.session import SessionOptions
from mlx_mcp.errors import InvalidRequest, RateLimited
from mlx_mcp.service.batch import generate_batch
from mlx_mcp.service.caller import Caller
from mlx_mcp.service.context import Context
from mlx_mcp.service.count import count_tokens
from mlx_mcp.service.generate import Options, generate
from mlx_mcp.service.limits import Limiter, Limits
from mlx_mcp.service.sessions import create_session, fork_session, persist_session
from mlx_mcp.service.warm import Warm, WarmContext
from tests.engine.test_client import until
from tests.service.house import asked, make_service, unheard

ANN, BOB = Caller("ann"), Caller("bob")


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Limited:
    """A service whose limits and time the test sets."""

    def __init__(self, **limits):
        self.limits, self.clock = Limits(**limits), Clock()
        self.limiter = Limiter(lambda tenant: self.limits if tenant else Limits(), self.clock)
        self.service = replace(make_service(), limits=self.limiter)

    async def say(self, prompt="hello", caller=ANN, **options):
        return (await generate(self.service, caller, asked(prompt), Options("tiny", **options), unheard)).result


@pytest.fixture
def limited(request):
    made = []

    def make(**limits):
        made.append(Limited(**limits))
        return made[-1]

    yield make
    for each in made:
        each.service.engine.close()


async def test_requests_a_minute_come_back_evenly_and_each_principal_has_its_own(limited):
    house = limited(requests_per_minute=3)
    for _ in range(3):
        await house.say()
    with pytest.raises(RateLimited, match=r"You may make 3 requests a minute, and have made 3 of late") as refused:
        await house.say()
    assert refused.value.retry_after_s == 20
    await house.say(caller=BOB)
    await house.say(caller=Caller())  # a window has no limit unless one is set
    house.clock.now += 19.9
    with pytest.raises(RateLimited):
        await house.say()
    house.clock.now += 0.2
    await house.say()


async def test_whatever_makes_the_server_work_is_a_request(limited):
    house = limited(requests_per_minute=100)
    service = house.service

    def used():
        account = house.limiter._accounts.get("ann")
        return 0 if account is None else 100 - round(account.requests.level)

    await house.say(keep=True)
    assert used() == 1
    await generate_batch(service, ANN, Context(), ["a", "b"], 1, Options("tiny"), unheard)
    assert used() == 3
    await create_session(service, ANN, Context("system"), "tiny", (), SessionOptions("notes"), unheard)
    assert used() == 4
    await fork_session(service, ANN, "notes", 2, (), "")
    assert used() == 5
    await count_tokens(service, ANN, asked("hello"), Options("tiny"), unheard)
    assert used() == 6


async def test_tokens_are_charged_as_they_are_computed_and_may_be_overdrawn_once(limited):
    house = limited(tokens_per_minute=60)
    result = await house.say("x" * 100, sampling=replace(Options().sampling, max_tokens=20))
    computed = result.prompt_tokens - result.cached_tokens + result.completion_tokens
    assert computed == 120
    with pytest.raises(RateLimited, match=r"tokens computed a minute, and have used 120 of late. Send less") as refused:
        await house.say()
    assert refused.value.retry_after_s == 61
    house.clock.now += 61
    cached = await house.say("x" * 100, sampling=replace(Options().sampling, max_tokens=1))
    assert cached.cached_tokens >= 96  # what is cached costs nothing
    assert house.limiter._accounts["ann"].tokens.level == pytest.approx(1 - (100 - cached.cached_tokens) - 1)


async def test_a_call_that_is_given_up_pays_for_what_it_used(limited):
    house = limited(tokens_per_minute=1000)
    runner = house.service.engine.loader.runner
    runner.endless = True
    call = asyncio.create_task(house.say("x" * 50, sampling=replace(Options().sampling, max_tokens=1900)))
    await until(lambda: (account := house.limiter._accounts.get("ann")) and account.tokens.level < 900)
    call.cancel()
    await asyncio.wait([call])
    assert house.limiter._accounts["ann"].num_calls == 0
    assert house.limiter._accounts["ann"].tokens.level < 900


async def test_calls_at_once_and_places_in_the_queue_are_given_back_however_a_call_ends(limited):
    house = limited(calls_at_once=2)
    await house.say()  # the model is there
    runner = house.service.engine.loader.runner
    runner.gate.clear()
    calls = [asyncio.create_task(house.say("abc")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(
        RateLimited, match=r"You have 2 calls at once and may have 2. Wait for some to end, and have them run"
    ):
        await house.say()
    house.limits = Limits(waiting=2)
    with pytest.raises(
        RateLimited, match=r"You have 2 calls that wait and may have 2. Wait for some to end, and have them begin"
    ):
        await house.say()
    bob = asyncio.create_task(house.say(caller=BOB))
    calls[0].cancel()
    await asyncio.wait([calls[0]])
    runner.gate.set()
    await calls[1]
    await bob
    house.limits = Limits(calls_at_once=2)
    runner.broken.add(ord("b"))
    for _ in range(3):
        with pytest.raises(Exception, match=r"broken"):
            await house.say("bad")
    await asyncio.gather(house.say(), house.say())
    assert house.limiter._accounts == {}


async def test_a_batch_is_let_in_as_a_whole_or_not_at_all(limited):
    house = limited(calls_at_once=4, requests_per_minute=5)

    async def ask(*prompts):
        return await generate_batch(house.service, ANN, Context(), prompts, 1, Options("tiny"), unheard)

    with pytest.raises(InvalidRequest, match=r"These are 5 calls at once, and you may have 4. Split the call"):
        await ask(*"abcde")
    house.limits = Limits(requests_per_minute=5)
    with pytest.raises(InvalidRequest, match=r"These are 6 requests, and you may make 5 a minute. Split the call"):
        await ask(*"abcdef")
    await ask(*"abc")
    with pytest.raises(RateLimited):
        await ask(*"abc")
    await ask(*"ab")  # the one that was refused took nothing


async def test_sessions_are_counted_while_they_are_made_too(limited):
    house = limited(sessions=3)
    first = await house.say(keep=True)
    made = await asyncio.gather(*(house.say(keep=True) for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(each, RateLimited) for each in made) == 2
    with pytest.raises(
        RateLimited, match=r"You have 3 sessions and sandboxes and may have 3, so 1 more cannot be made. Close some"
    ):
        await fork_session(house.service, ANN, first.session.session_id, 1, (), "")
    session = first.session.session_id
    await house.service.engine.close_sessions(
        "ann", (made[0].session.session_id if not isinstance(made[0], Exception) else session,)
    )
    batch = Options("tiny", session=session, keep=True)
    with pytest.raises(RateLimited):
        await generate_batch(house.service, ANN, Context(), ["a", "b"], 1, batch, unheard)
    await generate_batch(house.service, ANN, Context(), ["a"], 1, batch, unheard)
    await house.say(keep=True, caller=BOB)


async def test_memory_of_sessions_is_counted_once_for_what_they_share(limited):
    house = limited(session_bytes=250)
    first = await house.say("x" * 160, keep=True, sampling=replace(Options().sampling, max_tokens=1))
    held = await house.service.engine.held_bytes("ann")
    assert 140 <= held <= 170
    await fork_session(house.service, ANN, first.session.session_id, 20, (), "")
    assert await house.service.engine.held_bytes("ann") == held
    await house.say("y" * 160, keep=True, sampling=replace(Options().sampling, max_tokens=1))
    for options in ({"keep": True}, {"session": first.session.session_id}):
        with pytest.raises(RateLimited, match=r"MB of keys and values and may hold"):
            await house.say("z", **options)
    await house.say("z", session=first.session.session_id, keep=False)  # which keeps nothing
    await house.say("z")
    await house.say("z", keep=True, caller=BOB)


async def test_disk_is_checked_before_anything_is_written(limited):
    house = limited(disk_bytes=10)
    made = await house.say("x" * 40, keep=True)
    with pytest.raises(
        RateLimited, match=r"this session 0.0 MB more, and you may have 0.0 MB on disk. Close some of it"
    ):
        await persist_session(house.service, ANN, made.session.session_id, "")


async def test_what_the_operator_wants_warm_counts_for_nobody(limited):
    house = limited(calls_at_once=1, requests_per_minute=1, sessions=0)
    warm = Warm((WarmContext("notes", Context("system"), "tiny"),), create=create_session)
    house.service = replace(house.service, warm=warm)
    assert (
        await house.say("y", session="notes", keep=False)
    ).text == "systemy"  # a fake answers with all that it was told


def test_a_limit_that_changes_holds_for_the_next_call():
    limits, clock = {"ann": Limits(requests_per_minute=1)}, Clock()
    limiter = Limiter(limits.__getitem__, clock)
    limiter.request("ann")
    with pytest.raises(RateLimited):
        limiter.request("ann")
    limits["ann"] = Limits(requests_per_minute=600)
    clock.now += 1
    for _ in range(9):
        limiter.request("ann")


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 40)), max_size=60))
def test_never_more_than_twice_a_minutes_amount_is_let_in_within_a_minute(asks):
    clock, let_in = Clock(), []
    limiter = Limiter(lambda tenant: Limits(requests_per_minute=10), clock)
    for num, pause in asks:
        clock.now += pause
        try:
            limiter.request("ann", num)
        except RateLimited as refused:
            clock.now += min(60.0, refused.retry_after_s)
            limiter.request("ann", num)  # as was said
        let_in.append((clock.now, num))
        assert sum(n for at, n in let_in if clock.now - at < 60) <= 20
