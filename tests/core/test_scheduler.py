import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mcp.core import slots, steps
from mlx_mcp.core.lanes import Lanes
from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.core.slots import KvCost, Ledger, SlotPool
from mlx_mcp.core.steps import Decode
from mlx_mcp.errors import CapacityError, RequestTooLarge
from tests.effort import drawn

LIMITS = Limits(max_running=2, max_waiting=2, chunk_tokens=4, prefill_tokens_idle=8, prefill_tokens_busy=4)


def make(limits=LIMITS, limit_bytes=1 << 30):
    return Scheduler(limits, SlotPool(Ledger(limit_bytes), KvCost(token_bytes=1)))


def sequence(sequence_id, num_prompt, max_tokens=5, session=None, group="", principal=""):
    prompt_ids, lane = tuple(range(1, num_prompt + 1)), session or str(sequence_id)
    params = SamplingParams(max_tokens)
    return Sequence(sequence_id, prompt_ids, params, frozenset({0}), lane, group=group, principal=principal)


def chunks(step):
    return [(chunk.sequence_id, chunk.start, chunk.end) for chunk in step.prefill]


def take(scheduler):
    """Schedule a step and commit it with a token for everyone; returns the step."""
    step = scheduler.schedule()
    commit(scheduler, step, dict.fromkeys(step.drawing, 9))
    scheduler.check_integrity()
    return step


def commit(scheduler, step, tokens):
    """Commit a step, and remove the sequences that have ended; returns these."""
    running = {s.sequence_id: s for s in scheduler.running}
    ended = [running[i] for i in scheduler.commit(step, tokens)]
    for s in ended:
        scheduler.remove(s)
    return ended


# Chunks


def test_an_idle_engine_prefills_whole_chunks_up_to_its_budget():
    scheduler = make()
    scheduler.add(sequence(1, 11))
    assert chunks(take(scheduler)) == [(1, 0, 4), (1, 4, 8)]
    assert chunks(take(scheduler)) == [(1, 8, 11)]


def test_a_long_prompt_costs_decoding_rows_one_chunk_a_step():
    scheduler = make()
    decoding = sequence(1, 3)
    scheduler.add(decoding)
    take(scheduler)
    scheduler.add(sequence(2, 10))
    step = take(scheduler)
    assert step.decoding == [decoding.sequence_id]
    assert chunks(step) == [(2, 0, 4)]


def test_a_budget_is_never_exceeded():
    scheduler = make()
    for i in (1, 2):
        scheduler.add(sequence(i, 2))
    assert chunks(take(scheduler)) == [(1, 0, 2), (2, 0, 2)]
    scheduler = make(Limits(max_running=3, chunk_tokens=4, prefill_tokens_idle=5, prefill_tokens_busy=4))
    for i in (1, 2):
        scheduler.add(sequence(i, 3))
    assert chunks(take(scheduler)) == [(1, 0, 3)]


def test_prompts_get_more_of_a_step_where_others_do_not_wait_too_long_for_it():
    scheduler = make(Limits(3, 2, 4, prefill_tokens_idle=16, prefill_tokens_busy=4, prefill_wait_s=0.1))
    scheduler.add(sequence(1, 3, max_tokens=100))
    take(scheduler)
    scheduler.add(sequence(2, 90))
    found = []
    for seconds in (0.01, 0.01, 0.01, 0.2, 0.09):
        step = take(scheduler)
        scheduler.measure(step, seconds)
        found.append(sum(end - start for _, start, end in chunks(step)))
    assert found == [4, 8, 16, 16, 8]


def test_chunks_end_at_the_same_places_whatever_else_runs():
    cuts = {}
    for name in ("alone", "crowded"):
        scheduler = make()
        if name == "crowded":
            scheduler.add(sequence(7, 2, max_tokens=100))
            take(scheduler)
        scheduler.add(sequence(1, 10))
        cuts[name] = [chunk for _ in range(4) for chunk in chunks(take(scheduler))]
    assert cuts["alone"] == cuts["crowded"] == [(1, 0, 4), (1, 4, 8), (1, 8, 10)]


def test_a_short_prompt_is_not_held_up_by_a_long_one_that_came_first():
    scheduler = make()
    scheduler.add(sequence(1, 400))
    take(scheduler)
    scheduler.add(sequence(2, 4))
    assert [chunks(take(scheduler)) for _ in range(2)] == [[(1, 8, 12), (2, 0, 4)], [(1, 12, 16)]]


def test_a_first_token_does_not_wait_for_the_rest_of_a_long_prompt():
    limits = Limits(max_running=2, chunk_tokens=4, prefill_tokens_idle=40, prefill_tokens_busy=4)
    scheduler = make(limits)
    scheduler.add(sequence(1, 400))
    assert len(chunks(take(scheduler))) == 10
    scheduler.add(sequence(2, 3))
    assert chunks(take(scheduler)) == [(1, 40, 44), (2, 0, 3)]


# Turns


def test_sequences_are_admitted_first_come_first_served_and_a_finished_one_makes_room():
    scheduler = make()
    first, second, third = (sequence(i, 2, max_tokens=1) for i in (1, 2, 3))
    for s in (first, second, third):
        scheduler.add(s)
    assert scheduler.num_ahead(third) == 2
    step = scheduler.schedule()
    assert scheduler.running == [first, second]
    assert scheduler.num_ahead(third) == 0
    assert commit(scheduler, step, {1: 9, 2: 9}) == [first, second]
    scheduler.schedule()
    assert scheduler.running == [third]


def test_sessions_take_turns_for_places_and_within_one_the_order_holds():
    scheduler = make(Limits(max_running=1))
    for i, session in enumerate("aaaabbc"):
        scheduler.add(sequence(i, 2, max_tokens=1, session=session))
    ahead = {s.sequence_id: scheduler.num_ahead(s) for s in scheduler.waiting}
    order = [take(scheduler).rows[0] for _ in range(7)]
    assert order == [0, 4, 6, 1, 5, 2, 3]
    assert [ahead[i] for i in order] == [0, 1, 2, 3, 4, 5, 6]


def test_a_session_with_fifty_prompts_holds_up_no_session_with_one():
    limits = Limits(max_running=8, chunk_tokens=4, prefill_tokens_idle=8, prefill_tokens_busy=4)
    scheduler = make(limits)
    crowd = [sequence(i, 8, max_tokens=300, session="crowd") for i in range(50)]
    for s in crowd:
        scheduler.add(s)
    for _ in range(30):  # the crowd has every place
        take(scheduler)
    assert {s.lane for s in scheduler.running} == {"crowd"}
    singles = [sequence(100 + i, 8, max_tokens=20) for i in range(7)]
    for s in singles:
        scheduler.add(s)
    first_token, finished, rows = {}, [], {s.sequence_id: s for s in crowd + singles}
    for step_number in range(4000):
        if not scheduler.has_work:
            break
        for sequence_id in take(scheduler).drawing:
            first_token.setdefault(sequence_id, step_number)
            if rows[sequence_id].finish_reason:
                finished.append(sequence_id)
    # Eight sessions share the prefill budget: two chunks each need at most eight turns apiece, and a step over.
    assert max(first_token[s.sequence_id] for s in singles) <= 2 * 8 + 1
    assert max(finished.index(s.sequence_id) for s in singles) < finished.index(49)
    assert len(finished) == 57
    assert [len(s.output_ids) for s in crowd + singles] == [300] * 50 + [20] * 7


def test_prefill_is_shared_evenly_by_sessions_not_by_sequences():
    limits = Limits(max_running=8, chunk_tokens=4, prefill_tokens_idle=4, prefill_tokens_busy=4)
    scheduler = make(limits)
    for i in range(4):
        scheduler.add(sequence(i, 100, session="crowd"))
    scheduler.add(sequence(9, 100))
    served = [chunks(take(scheduler))[0][0] for _ in range(20)]
    assert served.count(9) == 10


def test_a_session_that_runs_nothing_gets_a_place_from_the_one_with_the_most():
    scheduler = make()
    first, second = sequence(1, 2, session="a"), sequence(2, 2, session="a")
    for s in (first, second):
        scheduler.add(s)
    take(scheduler)
    scheduler.add(other := sequence(3, 2, session="b"))
    step = take(scheduler)
    assert step.released == (second.sequence_id,)
    assert scheduler.running == [first, other]


def test_a_sequence_makes_place_for_another_session_once_and_no_more():
    scheduler = make()
    first, second = sequence(1, 2, max_tokens=50, session="a"), sequence(2, 2, max_tokens=5, session="a")
    for s in (first, second):
        scheduler.add(s)
    take(scheduler)
    for i in range(3, 30):  # one call after another of a session that never runs two
        if all(s.lane != "b" for s in scheduler.running) and "b" not in scheduler.waiting.queues:
            scheduler.add(sequence(i, 2, max_tokens=1, session="b"))
        take(scheduler)
    assert second.num_preemptions == 1
    assert len(second.output_ids) == 5


def test_one_who_has_the_turn_and_a_place_keeps_nobody_from_a_first_place():
    scheduler = make(Limits(max_running=2))
    for i in range(4):
        scheduler.add(sequence(i, 2, max_tokens=500, session="crowd"))
    take(scheduler)
    assert list(scheduler.waiting.queues) == ["crowd"]
    scheduler.add(single := sequence(9, 2))
    assert scheduler.schedule_ahead(scheduler.schedule()) is not None
    assert single in scheduler.running


def test_sequences_computed_again_after_a_fault_still_give_way():
    scheduler = make(Limits(max_running=2))
    for i in range(2):
        scheduler.add(sequence(i, 2, max_tokens=500, session="crowd"))
    take(scheduler)
    scheduler.preempt_all()
    take(scheduler)
    scheduler.add(single := sequence(9, 2))
    take(scheduler)
    assert single in scheduler.running


def test_a_session_never_loses_its_only_place():
    scheduler = make()
    for i in (1, 2, 3):
        scheduler.add(sequence(i, 2, max_tokens=4))
    steps = [take(scheduler) for _ in range(4)]
    assert all(step.released == () for step in steps)
    assert steps[-1].decoding == [1, 2]


# Groups


def test_a_group_with_thirty_calls_gives_a_place_to_one_with_one():
    scheduler = make(Limits(max_running=4))
    for i in range(30):  # each a session of its own, as calls are that keep nothing
        scheduler.add(sequence(i, 2, max_tokens=500, group="window"))
    take(scheduler)
    scheduler.add(single := sequence(99, 2, group="other"))
    step = take(scheduler)
    assert single in scheduler.running
    assert step.released == (3,)


def test_a_free_place_goes_to_the_group_that_runs_the_least():
    scheduler = make(Limits(max_running=3))
    for i in range(9):
        scheduler.add(sequence(i, 2, max_tokens=2, group="window"))
    for i in range(20, 23):
        scheduler.add(sequence(i, 2, max_tokens=2, group="other"))
    take(scheduler)
    assert [s.sequence_id for s in scheduler.running] == [0, 20, 1]
    while scheduler.has_work:
        step = scheduler.schedule()
        if any(s.group == "other" for s in scheduler.waiting):
            assert any(s.group == "other" for s in scheduler.running)
        commit(scheduler, step, dict.fromkeys(step.drawing, 9))


def test_a_session_takes_no_place_of_a_group_that_runs_less():
    scheduler = make(Limits(max_running=4))
    for i in range(2):
        scheduler.add(sequence(i, 2, max_tokens=50, session="batch", group="small"))
    for i in range(10, 20):
        scheduler.add(sequence(i, 2, max_tokens=50, group="large"))
    for _ in range(20):
        assert not take(scheduler).released
    assert [s.group for s in scheduler.running].count("small") == 2


def test_prefill_is_shared_evenly_by_groups_and_within_one_by_sessions():
    scheduler = make(Limits(max_running=8, chunk_tokens=4, prefill_tokens_idle=4, prefill_tokens_busy=4))
    for i in range(4):
        scheduler.add(sequence(i, 100, group="window"))
    scheduler.add(sequence(9, 100, group="other"))
    served = [chunks(take(scheduler))[0][0] for _ in range(24)]
    assert served.count(9) == 12
    assert [served.count(i) for i in range(4)] == [3, 3, 3, 3]


def test_a_group_that_fills_its_queue_shuts_no_other_out():
    scheduler = make()
    for i in range(4):
        scheduler.add(sequence(i, 2, group="window"))
    with pytest.raises(CapacityError):
        scheduler.add(sequence(10, 2, group="window"))
    scheduler.add(single := sequence(99, 2, group="other"))
    take(scheduler)
    assert single in scheduler.running


# Principals


def test_a_principal_with_thirty_windows_gives_a_place_to_one_with_one():
    scheduler = make(Limits(max_running=4))
    for i in range(30):
        scheduler.add(sequence(i, 2, max_tokens=500, group=f"window {i}", principal="many"))
    take(scheduler)
    scheduler.add(single := sequence(99, 2, group="window 0", principal="one"))
    step = take(scheduler)
    assert single in scheduler.running
    assert step.released == (3,)


def test_a_free_place_goes_to_the_principal_that_runs_the_least_and_then_to_its_group_that_does():
    scheduler = make(Limits(max_running=6))
    for i in range(12):
        scheduler.add(sequence(i, 2, max_tokens=50, group=f"window {i % 3}", principal="many"))
    for i in range(20, 26):
        scheduler.add(sequence(i, 2, max_tokens=50, group="x" if i < 25 else "y", principal="few"))
    take(scheduler)
    ran = [s.sequence_id for s in scheduler.running]
    assert sum(i >= 20 for i in ran) == 3
    assert 25 in ran  # its own window, beside one that has five calls
    assert {scheduler.running[ran.index(i)].group for i in ran if i < 20} == {"window 0", "window 1", "window 2"}


def test_windows_of_two_principals_are_not_one_group_because_they_have_one_name():
    scheduler = make()
    for i in range(4):
        scheduler.add(sequence(i, 2, group="listener", principal="many"))
    with pytest.raises(CapacityError):
        scheduler.add(sequence(10, 2, group="listener", principal="many"))
    scheduler.add(single := sequence(99, 2, group="listener", principal="one"))
    take(scheduler)
    assert single in scheduler.running


def test_prefill_is_shared_evenly_by_principals_then_by_windows_then_by_sessions():
    scheduler = make(Limits(max_running=8, chunk_tokens=4, prefill_tokens_idle=4, prefill_tokens_busy=4))
    for i in range(4):
        scheduler.add(sequence(i, 100, group="a" if i < 3 else "b", principal="many"))
    scheduler.add(sequence(9, 100, principal="one"))
    served = [chunks(take(scheduler))[0][0] for _ in range(24)]
    assert served.count(9) == 12
    assert [served.count(i) for i in range(4)] == [2, 2, 2, 6]


def test_no_group_takes_a_place_of_a_principal_that_runs_less_than_its_own():
    scheduler = make(Limits(max_running=6))
    for i in range(4):
        scheduler.add(sequence(i, 2, max_tokens=50, group=f"{i}", principal="many"))
    for i in range(10, 12):
        scheduler.add(sequence(i, 2, max_tokens=50, group="x", principal="few"))
    take(scheduler)
    scheduler.add(sequence(5, 2, max_tokens=50, group="new", principal="many"))
    for _ in range(10):
        assert not take(scheduler).released
    assert sum(s.principal == "few" for s in scheduler.running) == 2


@settings(max_examples=drawn(20), deadline=None)
@given(st.integers(0, 1 << 32), st.integers(2, 6), st.sampled_from([1 << 30, 2000]))
def test_however_a_principal_floods_the_calls_of_the_others_end_in_bounded_time(seed, max_running, limit_bytes):
    rng, quiet = random.Random(seed), max_running - 1
    limits = Limits(max_running, 40, chunk_tokens=16, prefill_tokens_idle=32, prefill_tokens_busy=16)
    scheduler, number, waits = make(limits, limit_bytes), 100, {}
    for step_number in range(500):
        for _ in range(rng.randint(0, 3)):
            number += 1
            lane, window = rng.choice([None, "s1", "s2"]), f"w{rng.randint(0, 30)}"
            flood = sequence(number, rng.randint(1, 60), rng.randint(1, 40), lane, window, "flood")
            if sum(s.group == window for s in scheduler.waiting) < 2:
                scheduler.add(flood)
        for name in range(quiet):
            if name not in waits and rng.random() < 0.05:
                waits[name] = step_number
                scheduler.add(sequence(name, 40, 10, principal=f"quiet {name}"))
        step = scheduler.schedule()
        for s in commit(scheduler, step, dict.fromkeys(step.drawing, 9)):
            if s.sequence_id < 100:
                del waits[s.sequence_id]
        scheduler.check_integrity()
        # At most each place ends a row of the flood first, and each chunk waits for one of each other principal.
        assert all(step_number - since < 40 + 10 + 3 * (quiet + 1) + 100 for since in waits.values())


# Memory


def test_what_does_not_fit_waits_and_nobody_small_slips_past():
    scheduler = make(Limits(max_running=8), limit_bytes=2048)
    large, larger, small = sequence(1, 1400), sequence(2, 1400), sequence(3, 10)
    for s in (large, larger, small):
        scheduler.add(s)
    take(scheduler)
    assert scheduler.running == [large]
    scheduler.remove(large)
    take(scheduler)
    assert scheduler.running == [larger, small]


def test_no_model_takes_for_ever_what_another_lacks():
    ledger = Ledger(4000)
    small, large = (Scheduler(Limits(), SlotPool(ledger, KvCost(token_bytes=1))) for _ in range(2))
    for i in range(3):
        small.add(sequence(i, 100, max_tokens=3))
    take(small)
    large.add(big := sequence(100, 3400, max_tokens=3))
    for i in range(3, 60):  # one call after another
        take(large)
        if big in large.running:
            break
        small.add(sequence(i, 100, max_tokens=3))
        take(small)
    assert big in large.running
    while small.has_work or large.has_work:
        take(small)
        take(large)
    assert (ledger.used_bytes, ledger.reserved_for) == (0, None)


def test_a_model_whose_callers_gave_up_holds_up_no_other():
    ledger = Ledger(4000)
    small, large = (Scheduler(Limits(), SlotPool(ledger, KvCost(token_bytes=1))) for _ in range(2))
    small.add(sequence(1, 1000, max_tokens=50))
    take(small)
    large.add(big := sequence(100, 3400))
    take(large)
    small.add(later := sequence(2, 10))
    take(small)
    assert later not in small.running
    large.remove(big)
    take(small)
    assert later in small.running


def test_what_can_never_fit_is_refused_at_once_with_the_figures():
    scheduler = make(limit_bytes=1_000_000)
    with pytest.raises(
        RequestTooLarge,
        match=r"need 1\.\d MB .*, and the server may use 1\.0 MB\. Lower max_tokens to \d+ or less \(left out it is",
    ) as caught:
        scheduler.add(sequence(1, 1000, max_tokens=1_200_000))
    most = int(str(caught.value).split("max_tokens to ")[1].split()[0])
    scheduler.add(sequence(2, 1000, max_tokens=most))
    with pytest.raises(RequestTooLarge):
        scheduler.add(sequence(3, 1000, max_tokens=most + 1))
    with pytest.raises(RequestTooLarge, match="Shorten the prompt, or have the server started with a larger max_kv"):
        scheduler.add(sequence(4, 1_200_000))


def test_a_row_that_outgrows_its_slot_moves_and_only_that_row():
    scheduler = make()
    growing, other = sequence(1, 60, max_tokens=200), sequence(2, 60, max_tokens=200)
    scheduler.add(growing)
    for _ in range(20):
        take(scheduler)
    scheduler.add(other)
    old, moves = growing.slot, []
    while not moves:
        moves = take(scheduler).moves
    assert [(m.sequence_id, m.old, m.new) for m in moves] == [(1, old, growing.slot)]
    assert growing.num_tokens == 130  # the step that computes token 129 found no room in 128; a token came with it
    assert growing.slot.capacity == 256


def test_when_memory_runs_out_the_youngest_gives_way_keeps_its_tokens_and_comes_back():
    # Both fit in slots of 1024 tokens; one that moves from there to 1536 leaves no room for the other.
    limits = Limits(max_running=2, chunk_tokens=64, prefill_tokens_idle=64, prefill_tokens_busy=64)
    scheduler = make(limits, limit_bytes=3000)
    old, young = sequence(1, 950, max_tokens=100), sequence(2, 900, max_tokens=200)
    for s in (old, young):
        scheduler.add(s)
    preempted = []
    while not preempted:
        preempted = list(take(scheduler).released)
    assert preempted == [young.sequence_id]
    kept = list(young.output_ids)
    assert len(kept) > 0
    assert young in scheduler.waiting.queues["2"]
    while scheduler.has_work:
        take(scheduler)
    assert young.output_ids[: len(kept)] == kept
    assert (len(old.output_ids), len(young.output_ids)) == (100, 200)
    assert scheduler.pool.ledger.used_bytes == 0


def test_a_preempted_row_is_computed_again_over_prompt_and_output():
    scheduler = make(Limits(max_running=1, chunk_tokens=4, prefill_tokens_idle=8, prefill_tokens_busy=4))
    scheduler.add(s := sequence(1, 3, max_tokens=20))
    for _ in range(7):
        take(scheduler)
    assert s.num_tokens == 10
    scheduler.preempt_all()
    scheduler.check_integrity()
    assert chunks(take(scheduler)) == [(1, 0, 4), (1, 4, 8)]
    assert s.tokens(2, 6) == (3, 9, 9, 9)
    step = take(scheduler)
    assert (chunks(step), step.prefill[0].last) == ([(1, 8, 10)], True)
    assert len(s.output_ids) == 8


def test_rows_that_give_way_together_come_back_in_their_order():
    scheduler = make(Limits(max_running=3))
    rows = [sequence(i, 3, max_tokens=20) for i in range(3)]
    for s in (*rows, sequence(9, 3)):
        scheduler.add(s)
    take(scheduler)
    scheduler.preempt_all()
    assert list(scheduler.waiting.queues) == ["0", "1", "2", "9"]
    take(scheduler)
    assert scheduler.running == rows


def test_a_row_that_cannot_grow_even_alone_is_computed_again_in_a_larger_slot():
    # 256 and 512 do not fit together, but 512 does.
    scheduler = make(limit_bytes=600)
    scheduler.add(s := sequence(1, 180, max_tokens=200))
    preempted = []
    while scheduler.has_work:
        preempted += take(scheduler).released
    assert preempted == [s.sequence_id]
    assert len(s.output_ids) == 200


# Queue


def test_a_full_queue_says_when_to_retry():
    scheduler = make()
    for i in range(4):
        scheduler.add(sequence(i, 1))
    scheduler.schedule()
    with pytest.raises(CapacityError, match=r"2 calls are running and 2 waiting.*Retry in 5 s") as caught:
        scheduler.add(sequence(9, 1))
    assert caught.value.retry_after_s == 5


def test_a_removed_sequence_is_scheduled_no_more_wherever_it_was():
    scheduler = make()
    running, waiting = sequence(1, 2), sequence(3, 2)
    for s in (running, sequence(2, 2), waiting):
        scheduler.add(s)
    scheduler.schedule()
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.remove(running)
    scheduler.check_integrity()
    assert chunks(scheduler.schedule()) == [(2, 0, 2)]


# Ends


def test_a_stop_token_ends_a_sequence_and_is_no_part_of_its_output():
    s = sequence(1, 1)
    s.append(5)
    s.append(0)
    assert (s.output_ids, s.finish_reason) == ([5], "stop")


def test_max_tokens_ends_a_sequence_with_length():
    s = sequence(1, 1, max_tokens=2)
    s.append(5)
    assert s.finish_reason is None
    s.append(6)
    assert s.finish_reason == "length"


# Steps as values


def test_a_decoding_row_is_fed_its_latest_token():
    scheduler = make()
    scheduler.add(sequence(1, 2))
    for token in (7, 8):
        commit(scheduler, scheduler.schedule(), {1: token})
    assert scheduler.schedule().decode == (Decode(1, 8),)


def test_a_step_is_printed_compared_and_pickled_without_any_sequence():
    scheduler = make()
    for s in (sequence(1, 2, session="a"), sequence(2, 9, session="a")):
        scheduler.add(s)
    take(scheduler)
    scheduler.add(sequence(3, 2, session="b"))
    step = scheduler.schedule()
    assert step.released == (2,)
    assert [row.sequence_id for row in step.admitted] == [3]
    assert step.decode
    assert step.prefill
    names = {name: value for name, value in [*vars(steps).items(), *vars(slots).items()] if isinstance(value, type)}
    assert eval(repr(step), {**names, "SamplingParams": SamplingParams}) == step
    assert pickle.loads(pickle.dumps(step)) == step
    assert hash(step) == hash(pickle.loads(pickle.dumps(step)))


# Running ahead


def test_a_step_goes_ahead_with_the_rows_that_are_not_sure_to_end():
    scheduler = make()
    short, long = sequence(1, 2, max_tokens=2), sequence(2, 2, max_tokens=9)
    for s in (short, long):
        scheduler.add(s)
    first = scheduler.schedule()
    second = scheduler.schedule_ahead(first)
    assert second.decode == (Decode(1, None), Decode(2, None))
    assert commit(scheduler, first, {1: 9, 2: 9}) == []
    third = scheduler.schedule_ahead(second)
    assert third.decode == (Decode(2, None),)
    assert commit(scheduler, second, {1: 9, 2: 0}) == [short, long]
    assert commit(scheduler, third, {2: 9}) == []  # computed for nothing
    assert long.output_ids == [9]
    scheduler.check_integrity()


@pytest.mark.parametrize("reason", ["a prompt is not read", "someone could be admitted", "a row has to move"])
def test_no_step_goes_ahead_of_other_work(reason):
    scheduler = make()
    scheduler.add(sequence(1, 127 if reason == "a row has to move" else 2, max_tokens=1 if "move" in reason else 50))
    if reason == "a row has to move":
        scheduler.running, scheduler.waiting = [], Lanes()
        scheduler.add(sequence(1, 64, max_tokens=100))
        while True:
            step = scheduler.schedule()
            (s,) = scheduler.running
            if step.decode and s.num_tokens == s.slot.capacity:
                break
            commit(scheduler, step, {1: 9})
    else:
        step = scheduler.schedule()
        assert scheduler.schedule_ahead(step) is not None
        commit(scheduler, step, {1: 9})
        scheduler.add(sequence(2, 30))
        if reason == "a prompt is not read":
            step = scheduler.schedule()
    assert scheduler.schedule_ahead(step) is None


@settings(max_examples=drawn(150, least=30), deadline=None)
@given(st.integers(0, 1 << 32), st.integers(512, 4000), st.integers(1, 6))
def test_whatever_comes_and_goes_every_sequence_gets_all_its_tokens_once(seed, limit_bytes, max_running):
    rng = random.Random(seed)
    limits = Limits(
        max_running=max_running, max_waiting=50, chunk_tokens=16, prefill_tokens_idle=32, prefill_tokens_busy=16
    )
    scheduler, ahead, alive, number = make(limits, limit_bytes), None, {}, 0
    computed = {}
    for _ in range(4000):
        if number < 12 and rng.random() < 0.2:
            number += 1
            lane, group, principal = rng.choice("abc"), rng.choice("xxy"), rng.choice("ppq")
            s = sequence(number, rng.randint(1, 200), rng.randint(1, 150), lane, group, principal)
            scheduler.add(s)
            alive[number] = s
        if alive and rng.random() < 0.02:
            scheduler.remove(alive.pop(rng.choice(list(alive))))
        if number == 12 and not alive:
            break
        step = ahead or scheduler.schedule()
        if ahead is None:
            for sequence_id in step.released:
                computed[sequence_id] = 0
        for chunk in step.prefill:  # every token is computed once, in order, within the slot
            assert computed.get(chunk.sequence_id, 0) == chunk.start
            computed[chunk.sequence_id] = chunk.end
            assert chunk.end <= alive[chunk.sequence_id].slot.capacity
        for sequence_id in step.decoding:
            computed[sequence_id] += 1
            s = alive.get(sequence_id)
            assert s is None or computed[sequence_id] <= s.slot.capacity
        ahead = scheduler.schedule_ahead(step) if rng.random() < 0.5 else None
        for s in commit(scheduler, step, dict.fromkeys(step.drawing, 9)):
            assert len(alive.pop(s.sequence_id).output_ids) == s.params.max_tokens
        scheduler.check_integrity()
        scheduler.pool.ledger.check_integrity(scheduler.pool.used_bytes)
    assert not alive
    assert not scheduler.has_work
    assert scheduler.pool.ledger.used_bytes == 0
