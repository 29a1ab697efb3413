import pytest

from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.errors import CapacityError

LIMITS = Limits(max_running=2, max_waiting=2, chunk_tokens=4, prefill_tokens_idle=8, prefill_tokens_busy=4)


def sequence(sequence_id, num_prompt, max_tokens=5):
    return Sequence(sequence_id, tuple(range(1, num_prompt + 1)), SamplingParams(max_tokens), frozenset({0}))


def chunks(step):
    return [(chunk.sequence.sequence_id, chunk.start, chunk.end) for chunk in step.prefill]


def test_an_idle_engine_prefills_whole_chunks_up_to_its_budget():
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(1, 11))
    step = scheduler.schedule()
    assert chunks(step) == [(1, 0, 4), (1, 4, 8)]
    scheduler.commit(step, {})
    assert chunks(scheduler.schedule()) == [(1, 8, 11)]


def test_a_long_prompt_costs_decoding_rows_one_chunk_a_step():
    scheduler = Scheduler(LIMITS)
    decoding = sequence(1, 3)
    scheduler.add(decoding)
    scheduler.commit(scheduler.schedule(), {1: 9})
    scheduler.add(sequence(2, 10))
    step = scheduler.schedule()
    assert step.decode == (decoding,)
    assert chunks(step) == [(2, 0, 4)]


def test_chunks_begin_at_the_same_places_whatever_else_runs():
    alone, crowded = Scheduler(LIMITS), Scheduler(LIMITS)
    alone.add(sequence(1, 10))
    crowded.add(sequence(7, 2, max_tokens=100))
    crowded.commit(crowded.schedule(), {7: 9})
    crowded.add(sequence(1, 10))
    cuts = {}
    for name, scheduler in (("alone", alone), ("crowded", crowded)):
        cuts[name] = []
        while not cuts[name] or cuts[name][-1][2] < 10:
            step = scheduler.schedule()
            cuts[name] += chunks(step)
            scheduler.commit(step, {s.sequence_id: 9 for s in step.decode})
    assert cuts["alone"] == cuts["crowded"] == [(1, 0, 4), (1, 4, 8), (1, 8, 10)]


def test_sequences_are_admitted_first_come_first_served_and_a_finished_one_makes_room():
    scheduler = Scheduler(LIMITS)
    first, second, third = (sequence(i, 2, max_tokens=1) for i in (1, 2, 3))
    for s in (first, second, third):
        scheduler.add(s)
    step = scheduler.schedule()
    assert scheduler.running == [first, second]
    assert scheduler.num_ahead(third) == 1
    assert scheduler.commit(step, {1: 9, 2: 9}) == [first, second]
    scheduler.schedule()
    assert scheduler.running == [third]


def test_a_full_queue_says_when_to_retry():
    scheduler = Scheduler(LIMITS)
    for i in range(4):
        scheduler.add(sequence(i, 1))
    scheduler.schedule()
    with pytest.raises(CapacityError, match=r"2 calls are running and 2 waiting.*Retry in 5 s") as caught:
        scheduler.add(sequence(9, 1))
    assert caught.value.retry_after_s == 5


def test_a_removed_sequence_is_scheduled_no_more_wherever_it_was():
    scheduler = Scheduler(LIMITS)
    running, waiting = sequence(1, 2), sequence(3, 2)
    for s in (running, sequence(2, 2), waiting):
        scheduler.add(s)
    scheduler.schedule()
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.remove(running)
    assert chunks(scheduler.schedule()) == [(2, 0, 2)]


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
