"""Calls in their table: who waits for what, in which order they are woken, and what their callers are told."""

import pytest

from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine.awaited import (
    BlocksReading,
    CallState,
    Encoding,
    Memory,
    ModelLoading,
    Place,
    PrefixComputing,
    Reloading,
    SessionReading,
    StoreOpening,
    TurnOf,
)
from mlx_mcp.engine.call import Calls
from mlx_mcp.engine.generation import queued
from mlx_mcp.engine.messages import Cancel, Close, EncodeAgain, Encoded, Failed, Find, Waiting
from mlx_mcp.errors import CapacityError, EngineDead
from tests.engine.house import House, words
from tests.engine.test_persistence import KeptHouse


@pytest.fixture
def told():
    return []


@pytest.fixture
def calls(told):
    return Calls(lambda call_id, event: told.append((call_id, event)) or True)


def add(calls, *call_ids):
    return [calls.add(Find(call_id, "tiny"), 0.0) for call_id in call_ids]


def state(house, events):
    return house.engine.calls.get(events.sequence_id).state


def test_calls_are_woken_in_the_order_in_which_they_came_to_wait(calls):
    first, second, third, other = add(calls, 1, 2, 3, 4)
    for call in (second, first, third):
        calls.wait(call, TurnOf("s"))
    calls.wait(other, TurnOf("t"))
    assert calls.wake_first(TurnOf("s")) is second
    assert calls.wake(TurnOf("s")) == [first, third]
    assert calls.wake(TurnOf("s")) == []
    assert [call.awaits for call in (first, second, third, other)] == [None, None, None, TurnOf("t")]
    calls.check_integrity()


def test_a_call_that_ends_waits_for_nothing_any_more(calls, told):
    one, two = add(calls, 1, 2)
    for call in (one, two):
        calls.wait(call, StoreOpening())
    calls.fail(one, EngineDead("gone"))
    assert [(call_id, type(event)) for call_id, event in told] == [(1, Failed)]
    assert calls.wake(StoreOpening()) == [two]
    assert (one.state, list(calls)) == (CallState.ENDED, [two])
    calls.end(one)
    calls.check_integrity()


def test_what_a_call_waits_for_is_what_its_caller_is_told():
    told = [
        (Waiting(3), "queued behind 3 calls"),
        (Waiting(2, TurnOf("s")), "queued behind 2 calls: waits for another turn of its session"),
        (Waiting(0, Memory(40_000_000)), "queued behind 0 calls: waits for memory: needs 40 MB"),
        (Waiting(0, Memory(40_000)), "queued behind 0 calls: waits for memory: needs 0.0 MB"),
        (Waiting(0, ModelLoading("tiny")), "queued: waits for a model that is being read"),
        (Waiting(0, SessionReading("s")), "queued: waits for its session to be read from disk"),
    ]
    assert [queued(event) for event, _ in told] == [line for _, line in told]


def test_who_waits_for_another_turn_hears_so_at_once():
    house = House()
    session = house.open("abc")
    turn, following = house.say("|one", session), house.say("|two", session, queue=True)
    assert following == [Waiting(1, TurnOf(session))]
    assert (state(house, turn), state(house, following)) == (CallState.AWAITS_MEMORY, CallState.AWAITS_TURN)
    house.engine.step()
    assert state(house, turn) is CallState.DECODE


def test_who_waits_for_memory_or_a_place_hears_so_within_a_second_and_once():
    for limits, awaited in (({"max_running": 4}, Memory(256)), ({"max_running": 1}, Place())):
        house = House(max_kv_bytes=300, limits=limits)
        first, second = house.say(words(150), max_tokens=20), house.say(words(150, "A"), max_tokens=20)
        house.engine.step()
        for _ in range(2):
            house.now += 1.5
            house.engine.check_time()
        assert second == [Waiting(1), Waiting(0, awaited)]
        assert (state(house, first), state(house, second)) == (CallState.PREFILL, CallState.AWAITS_MEMORY)
        house.run()
        assert second.text


def test_who_waits_for_a_prefix_that_another_computes_hears_so():
    house = House()
    house.say(words(100) + "A")
    follower = house.say(words(100) + "B")
    house.engine.step()
    house.now += 1.5
    house.engine.check_time()
    assert follower[-1] == Waiting(0, PrefixComputing())
    assert state(house, follower) is CallState.AWAITS_PREFIX
    house.run()
    assert follower.text


def test_who_waits_for_the_disk_hears_for_what(tmp_path):
    house = KeptHouse(tmp_path / "store")
    session = house.prime(words(100))
    house.persist(session)
    house.die()
    house = KeptHouse(tmp_path / "store", opened=False)
    turn = house.say("on", session, after="user")
    heard = []
    for _ in range(3):
        house.now += 1.5
        house.engine.check_time()
        heard.append(turn[-1])
        house.io.run()()
    assert heard[:2] == [Waiting(0, StoreOpening()), Waiting(0, SessionReading(session))]
    assert isinstance(heard[2].awaits, BlocksReading)
    house.settle()
    assert turn.text


def test_a_prompt_that_is_never_encoded_again_is_not_waited_for_for_ever():
    house = House(max_wait_s=60)
    session = house.prime("abc")
    turn, following = house.say("|hi", session), house.say("x", session, after="user", queue=True)
    assert state(house, turn) is CallState.AWAITS_TOKENS
    assert house.engine.calls.waiting_for(Encoding(turn.sequence_id))
    for _ in range(3):
        house.now += 25
        house.engine.check_time()
    assert isinstance(turn.error, CapacityError)
    house.run()
    assert following.text


def test_whatever_a_call_waits_for_a_cancel_and_the_end_of_its_session_end_it():
    house = House()
    session = house.prime("abc")
    busy = house.say("a", session, after="user")
    waits, again = (house.say(text, session, after="user", queue=True) for text in ("b", "c"))
    house.engine.handle(Cancel(again.sequence_id))
    house.ask(Close, "ann", (session,))
    assert isinstance(busy.error, type(waits.error))
    assert not house.engine.calls
    house.engine.check_integrity()
    opened = house.say("abc", opens=SessionOptions("mine"))
    assert not isinstance(opened[-1], Failed)
    house.run()


def test_a_call_whose_model_was_unloaded_waits_for_it_as_long_as_that_takes():
    house = House(max_wait_s=60)
    house.load("other")
    waits = house.say("abc")
    assert waits == [EncodeAgain(loaded=False)]
    assert state(house, waits) is CallState.AWAITS_MODEL
    for _ in range(5):
        house.now += 25
        house.engine.check_time()
    assert waits[-1] == Waiting(0, Reloading(waits.sequence_id))
    house.load("tiny")
    house.engine.handle(Encoded(waits.sequence_id, tuple(map(ord, "xyz")), SamplingParams(9), None, ""))
    house.run()
    assert waits.text == "xyz"
