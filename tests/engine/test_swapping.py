"""More models than there is room for: whose turn it is, what waits, and what comes back."""

import pytest

from mlx_mcp.core.ports import ModelOptions
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.engine.awaited import CallState, ModelRoom
from mlx_mcp.engine.messages import Cancel, Failed, Find, Finished, Fork, Loaded, Persist, Turn, Unloaded
from mlx_mcp.engine.persistence import PersistenceOptions, Persisting
from mlx_mcp.errors import CapacityError, EngineDead, ModelBusy, ModelError
from tests.engine.hand_io import HandIo
from tests.engine.swaps import STEP_S, Models
from tests.fakes import FakeStore

TURN_S = 10.0
LOAD_S = 6 * STEP_S  # four slices, and a step to begin and to end


def test_calls_that_alternate_between_two_models_with_room_for_one_are_all_answered_by_two_loads():
    house = Models()
    calls = [house.call("ab"[i % 2], f"call {i}") for i in range(20)]
    house.run()
    assert [call.output for call in calls] == [call.text for call in calls]
    assert house.loader.loads == ["a", "b"]
    assert house.longest_wait_s <= 2 * (TURN_S + LOAD_S + 20 * STEP_S)


def test_a_call_that_waits_for_room_is_told_for_which_model():
    house = Models()
    house.call("a", "x" * 15)
    waits = house.call("b")
    again = house.call("b")
    house.step()
    state = house.engine.calls.get(waits.hold).state
    assert state is CallState.AWAITS_ROOM
    assert waits.waits_for[0] == again.waits_for[0] == "for a to make room for b"
    house.run()


def test_a_model_that_is_never_idle_makes_room_after_its_turn_and_gets_it_back():
    house = Models(model_turn_s=TURN_S)
    house.call("a", "x" * 15)
    for _ in range(8):
        house.step()
    waits = house.call("b", "hello")
    began = house.now
    while waits.end is None:
        house.call("a", "y" * 15)  # one is always running
        house.step()
        assert house.now - began < 60
    assert TURN_S <= waits.waited_s <= TURN_S + 20 * STEP_S + LOAD_S
    assert waits.output == "bhello"
    late = [call for call in house.callers if call.name == "a" and call.end is None]
    assert late
    house.run()
    assert house.loader.loads == ["a", "b", "a"]
    assert house.ends == {Finished: len(house.callers)}


@pytest.mark.parametrize("seed", range(5))
def test_two_hundred_calls_of_five_models_wait_within_the_stated_bound(seed):
    house = Models(seed=seed, model_turn_s=TURN_S)
    for i in range(200):
        house.call("abcde"[i % 5] if seed == 0 else house.chance.choice("abcde"), f"call {i}")
        for _ in range(house.chance.randrange(3) if seed else 0):
            house.step()
    house.run()
    assert house.ends == {Finished: 200}
    assert all(call.output == call.text for call in house.callers)
    assert house.longest_wait_s <= 5 * (TURN_S + LOAD_S + 20 * STEP_S)
    if seed == 0:  # all at once
        assert len(house.loader.loads) == 5


def test_two_models_that_fit_stay_while_a_third_takes_turns_with_the_one_loaded_first():
    house = Models(room=2, model_turn_s=TURN_S)
    house.call("a", "x" * 15)
    house.step()
    house.step()
    house.call("b", "x" * 15)
    waits = house.call("c", "hi")
    while waits.end is None:
        house.call("a", "y" * 10)
        house.call("b", "y" * 10)
        house.step()
        assert "b" in house.names or house.now < 5
        assert house.now < 60
    assert house.loader.loads[:3] == ["a", "b", "c"]
    house.run()


def test_a_caller_that_encodes_its_prompt_keeps_the_model_and_lets_it_go_when_it_is_cancelled():
    house = Models()
    first, held = house.call("a"), house.call("a", encoding=True)
    for _ in range(8):
        house.step()
    waits = house.call("b")
    house.step()
    assert first.end is not None
    assert house.names == ("a",)
    house.engine.handle(Cancel(held.hold))
    house.callers.remove(held)
    house.run()
    assert isinstance(waits.end, Finished)


def test_whoever_never_submits_holds_a_model_as_long_as_a_call_may_wait_and_no_longer():
    house = Models(max_wait_s=60)
    held = house.call("a", encoding=True)
    for _ in range(8):
        house.step()
    house.step(30)
    waits = house.call("b")
    assert house.names == ("a",)
    house.step(40)
    assert isinstance(held.end.error, CapacityError)
    house.run()
    assert isinstance(waits.end, Finished)


def test_a_call_waits_for_room_as_long_as_any_may_wait_and_is_told_to_come_again():
    house = Models(max_wait_s=60)
    house.call("a", "x" * 500, max_tokens=500)
    waits, kept = house.call("b"), house.call("a")
    for _ in range(8):
        house.step()
    while waits.end is None:
        house.step(2)
    assert 60 <= house.now <= 90
    assert isinstance(waits.end.error, CapacityError)
    assert "room for 'b', while calls of 'a' ran" in str(waits.end.error)
    assert not house.engine.swapping.line
    house.run()
    assert isinstance(kept.end, Finished)


def test_cancelled_calls_leave_the_line_and_a_model_that_was_to_go_goes_on():
    house = Models(model_turn_s=1)
    house.call("a", "x" * 15)
    for _ in range(8):
        house.step()
    doomed = house.call("b")
    house.step(2)
    assert house.engine.models.by_name["a"].closing
    late = house.call("a", "late")
    assert late.hold in [call.call_id for call in house.engine.calls.waiting_for(ModelRoom("a"))]
    house.engine.handle(Cancel(doomed.hold))
    house.callers.remove(doomed)
    assert not house.engine.models.by_name["a"].closing
    house.run()
    assert late.output == "alate"
    assert house.loader.loads == ["a"]


def test_a_closed_model_takes_no_call_of_who_only_remembers_it_and_loads_again_for_it_later():
    house = Models(model_turn_s=1)
    house.call("a", "x" * 30, max_tokens=60)
    for _ in range(8):
        house.step()
    house.call("b")
    house.step(2)
    assert house.tell(lambda call_id: Find(call_id, "a")) == [Unloaded()]
    late = house.call("a", "late")
    house.engine.handle(Cancel(late.hold))
    late.events.clear()
    late.submit()  # as a client does that holds nothing
    house.run()
    assert late.output == "alate"
    assert house.loader.loads == ["a", "b", "a"]


def test_stop_and_the_death_of_the_engine_end_who_waits_for_room():
    for end in (lambda engine: engine.stop(), lambda engine: engine.fail_all(EngineDead("test"))):
        house = Models()
        house.call("a", "x" * 15)
        waits = house.call("b")
        house.step()
        end(house.engine)
        assert isinstance(waits.end.error, EngineDead)
        assert not house.engine.calls
        assert not house.engine.has_work


# What comes back


def test_what_a_user_had_loaded_comes_back_after_the_model_that_it_went_for_has_failed():
    house = Models()
    house.loader.failing.add("b")
    asked = house.ask("a")
    house.run()
    assert isinstance(asked[-1], Loaded)
    failed = house.call("b")
    house.run()
    assert isinstance(failed.end.error, ModelError)
    assert "disk gone" in str(failed.end.error)
    assert house.names == ("a",)
    assert house.loader.loads == ["a", "b", "a"]


def test_what_only_calls_had_loaded_comes_back_after_a_failed_load_if_calls_wait_for_it():
    house = Models(model_turn_s=1)
    house.loader.failing.add("b")
    house.call("a", "x" * 15)
    for _ in range(8):
        house.step()
    failed = house.call("b")
    house.step(2)
    waits = house.call("a", "more")
    house.run()
    assert isinstance(failed.end, Failed)
    assert waits.output == "amore"
    assert house.loader.loads == ["a", "b", "a"]
    nobody = Models()
    nobody.loader.failing.add("b")
    nobody.call("a")
    nobody.run()
    nobody.call("b")
    nobody.run()
    assert nobody.names == ()


def test_what_is_to_come_back_takes_no_room_from_others():
    house = Models()
    house.loader.failing.add("b")
    house.ask("a")
    house.run()
    house.call("b")
    house.step()
    house.call("c", "hello")
    house.run()
    assert house.names == ("c",)
    assert not house.engine.swapping.line


@pytest.mark.parametrize("seed", range(3))
def test_fifty_swaps_under_load_of_which_a_third_fail_lose_no_call_and_no_session(seed):
    house = Models(seed=seed, fail_share=1 / 3, model_turn_s=1)
    sessions: dict[str, tuple[str, str]] = {}  # handle → model and log
    turns = {}
    while len(house.loader.loads) < 50:
        name = house.chance.choice("abc")
        idle = [h for h, (model, _) in sessions.items() if model == name and h not in turns.values()]
        if idle and house.chance.random() < 0.5:
            handle = house.chance.choice(idle)
            turn = Turn("ann", handle, house.after(Turn("ann", handle)), keep=True)
            turns[house.call(name, "|more", turn=turn)] = handle
        else:
            house.call(name, "hello", turn=Turn("ann", opens=SessionOptions()))
        for _ in range(house.chance.randrange(12)):
            house.step()
        for call in [call for call in house.callers if call.end is not None]:
            house.callers.remove(call)
            handle = turns.pop(call, None)
            if isinstance(call.end, Failed):
                assert "disk gone" in str(call.end.error), call.end
            elif handle is None:
                assert call.output == call.text
                sessions[call.end.session.session_id] = call.name, call.text * 2
            else:
                assert call.output == "more"
                sessions[handle] = call.name, sessions[handle][1] + call.text + call.output
    house.loader.fail_share = 0
    house.run()
    assert sum(house.loader.loads.count(name) for name in "abc") >= 50
    for handle, (model, log) in sessions.items():
        if handle in turns.values():
            continue
        session = house.engine.sessions.sessions[handle]
        assert session.model == model
        assert "".join(map(chr, session.log)) == log


def test_sessions_and_forks_of_a_model_that_went_come_back_with_it_and_compute_nothing_again():
    house = Models()
    opened = house.call("a", "bcdefgh", turn=Turn("ann", opens=SessionOptions()))
    house.run()
    handle = opened.end.session.session_id
    heard = house.tell(lambda call_id: Fork(call_id, "ann", handle, 2, ()))
    forks = [info.session_id for info in heard[-1].infos]
    house.call("b")
    house.run()
    assert house.names == ("b",)
    turns = [house.call("a", "|x", turn=Turn("ann", h, "assistant", keep=True)) for h in (handle, *forks)]
    house.run()
    assert [turn.output for turn in turns] == ["x"] * 3
    again = [event for turn in turns for event in turn.events if type(event).__name__ == "Prefilled"]
    assert all(event.num_cached >= 15 for event in again)


def test_a_persisted_session_of_a_model_that_went_is_read_from_disk_when_that_comes_back():
    io, store = HandIo(), FakeStore()
    house = Models(persisting=Persisting(lambda: store, io, PersistenceOptions()))
    io.engine = house.engine
    io.run_all()
    opened = house.call("a", "bcdefgh", turn=Turn("ann", opens=SessionOptions()))
    house.run()
    handle = opened.end.session.session_id
    house.tell(lambda call_id: Persist(call_id, "ann", handle, ""))
    io.run_all()
    house.call("b")
    house.run()
    house.engine.cache.pool.reclaim(1 << 20)
    turn = house.call("a", "|x", turn=Turn("ann", handle, "assistant", keep=True))
    while turn.end is None:
        house.step()
        io.run_all()
    assert turn.output == "x"


# What stays, and what goes


def test_a_pinned_model_is_never_unloaded_for_another_which_is_told_so_at_once():
    house = Models()
    house.options["a"] = ModelOptions(pinned=True)
    house.call("a")
    house.run()
    refused = house.call("b")
    assert isinstance(refused.end.error, ModelError)
    assert "beside the pinned models ('a'" in str(refused.end.error)
    assert house.names == ("a",)
    assert house.unload("a") == Unloaded(100)
    house.call("b")
    house.run()
    assert house.names == ("b",)


def test_a_pinned_model_stays_though_it_was_used_longest_ago():
    house = Models(room=2)
    house.options["a"] = ModelOptions(pinned=True)
    for name in "abc":
        house.call(name)
        house.run()
    assert house.names == ("a", "c")


def test_of_idle_models_the_one_used_longest_ago_goes():
    house = Models(room=2)
    for name in "aba":
        house.call(name)
        house.run()
    house.call("c")
    house.run()
    assert house.names == ("a", "c")


def test_a_model_that_nobody_uses_goes_after_its_own_time_or_that_of_all():
    house = Models(room=3, model_ttl_s=60)
    house.options["b"] = ModelOptions(ttl_s=300)
    for name in "ab":
        house.call(name)
    house.run()
    assert house.engine.idle_s == 1
    house.now += 50
    house.call("a")
    house.run()
    house.now += 50
    house.engine.check_time()
    assert house.names == ("a", "b")
    house.now += 20
    house.engine.check_time()
    assert house.names == ("b",)
    house.now += 300
    house.engine.check_time()
    assert house.names == ()
    assert house.engine.idle_s is None


def test_a_model_that_calls_use_or_wait_for_is_not_unloaded_and_one_that_is_not_there_is_no_error():
    house = Models()
    running, waits = house.call("a", "x" * 15), house.call("b")
    for _ in range(8):
        house.step()
    for name, why in (("a", "calls run"), ("b", "it is being loaded. Wait")):
        refused = house.unload(name)
        assert isinstance(refused.error, ModelBusy)
        assert why in str(refused.error)
        assert "Wait for its calls to end" in str(refused.error)
    house.run()
    assert isinstance(running.end, Finished)
    assert isinstance(waits.end, Finished)
    assert house.unload("b") == Unloaded(100)
    assert house.unload("b") == house.unload("nothing") == Unloaded(0)
