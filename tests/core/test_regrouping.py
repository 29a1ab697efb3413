"""Rows brought together in slabs, where a device asks for it."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.core.slots import GPU_SLABS, KvCost, Ledger, SlotPool
from tests.effort import drawn

LIMITS = Limits(max_running=16, max_waiting=100)


def scheduler(limit_bytes=1 << 30):
    return Scheduler(LIMITS, SlotPool(Ledger(limit_bytes), KvCost(1, slabs=GPU_SLABS)))


def add(machine, *lengths, first=0, max_tokens=1000):
    made = [Sequence(first + i, (7,) * n, SamplingParams(max_tokens), frozenset()) for i, n in enumerate(lengths)]
    for sequence in made:
        machine.add(sequence)
    return made


def step(machine):
    """One step: the row of a sequence must never be read from a place to which it was not written."""
    planned = machine.schedule()
    machine.check_integrity()
    machine.commit(planned, dict.fromkeys(planned.drawing, 7))
    return planned


def runs(machine):
    """How many runs of neighbouring slots the rows of each class lie in."""
    found = Counter()
    taken = {(s.slot.slab, s.slot.index) for s in machine.running}
    for slab, index in taken:
        found[slab.capacity] += (slab, index - 1) not in taken
    return found


def test_rows_that_come_one_after_another_end_in_one_slab():
    machine = scheduler()
    for i in range(16):
        add(machine, 40 + i, first=i)
        step(machine)
    step(machine)
    assert len(machine.running) == 16
    assert runs(machine) == {512: 1}


def test_a_row_is_copied_a_few_times_at_most_while_others_come():
    machine, copies = scheduler(), Counter()
    for i in range(16):
        add(machine, 40, first=i)
        copies.update(move.sequence_id for move in step(machine).moves)
    assert max(copies.values()) <= 5
    assert copies.total() <= 2 * 16


def test_the_last_row_moves_into_the_gap_that_another_leaves():
    machine = scheduler()
    rows = add(machine, *[40] * 8)
    for _ in range(20):
        step(machine)
    *_, before_last, last = sorted(rows, key=lambda row: row.slot.index)
    gap = before_last.slot
    machine.remove(before_last)
    assert [(move.sequence_id, move.new) for move in step(machine).moves] == [(last.sequence_id, gap)]
    assert runs(machine) == {512: 1}


def test_rows_stay_where_they_are_while_there_is_no_memory_to_move_them():
    machine = scheduler(limit_bytes=5 * 512)
    add(machine, *[40] * 5)
    for _ in range(12):
        assert step(machine).moves == ()
    assert len(machine.running) == 5


@settings(max_examples=drawn(100, least=15), deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1400), st.integers(1, 40)), min_size=1, max_size=30), st.randoms())
def test_whoever_comes_and_goes_each_class_is_one_run_once_nobody_comes(asked, chance):
    machine, left, number = scheduler(), list(asked), 0
    while left or machine.has_work:
        if left and chance.random() < 0.5:
            length, max_tokens = left.pop()
            add(machine, length, first=number, max_tokens=max_tokens)
            number += 1
        ended = [s for s in machine.running if s.finish_reason is not None]
        for sequence in ended:
            machine.remove(sequence)
        if not machine.has_work:
            continue
        planned = step(machine)
        if not planned.admitted and not planned.moves:
            assert all(count == 1 for count in runs(machine).values())
    assert machine.pool.used_bytes == 0
