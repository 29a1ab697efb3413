"""Brings rows together in slabs, on devices on which each slab, and each gap in it, costs operations in every layer.

Rows of one capacity class move into one slab, half as large again as they need, so that each row is copied a few
times at most while others come. When a row leaves, the last one of its slab moves to its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import MAX_SHARED_CAPACITY, MAX_SLAB_SLOTS, Slab, Slot, SlotPool
from mlx_mcp.core.steps import Move


def regroup(pool: SlotPool, rows: Iterable[Sequence]) -> Iterator[tuple[Sequence, Move]]:
    """Give rows other slots where that makes fewer runs of them; only `rows` are moved, and those of their slabs count.

    Nothing moves for which there is no memory beside what it frees.
    """
    by_capacity: dict[int, dict[Slab, list[Sequence]]] = {}
    for row in rows:
        if row.slot is not None and row.slot.capacity <= MAX_SHARED_CAPACITY:
            by_capacity.setdefault(row.slot.capacity, {}).setdefault(row.slot.slab, []).append(row)
    for capacity, slabs in by_capacity.items():
        largest = max(slabs, key=lambda slab: slab.num_slots)
        others = [row for slab, members in slabs.items() if slab != largest for row in members]
        num_rows = len(slabs[largest]) + len(others)
        if others and num_rows <= MAX_SLAB_SLOTS:
            if len(others) <= len(pool.free[largest.slab_id]):
                yield from (moved(pool, row, pool.take_at(largest, min(pool.free[largest.slab_id]))) for row in others)
            elif (new := pool.take_together(capacity, num_rows)) is not None:
                yield from (moved(pool, *pair) for pair in zip([*slabs[largest], *others], new, strict=True))
                continue
        for slab, members in slabs.items():
            if slab.slab_id in pool.slabs:
                yield from close_gaps(pool, slab, members)


def close_gaps(pool: SlotPool, slab: Slab, members: list[Sequence]) -> Iterator[tuple[Sequence, Move]]:
    """Move the last rows of a slab into the gaps before them."""
    num_taken = slab.num_slots - len(pool.free[slab.slab_id])
    last_first = sorted(members, key=lambda row: -index_of(row))
    for row in last_first:
        gap = min(pool.free[slab.slab_id], default=slab.num_slots)
        if index_of(row) < num_taken or gap >= num_taken:
            return
        yield moved(pool, row, pool.take_at(slab, gap))


def moved(pool: SlotPool, row: Sequence, new: Slot) -> tuple[Sequence, Move]:
    """Give a row a slot that was taken for it, and its old one back."""
    old = row.slot
    assert old is not None, f"sequence {row.sequence_id} moves without a slot"
    pool.give_back(old)
    row.slot = new
    return row, Move(row.sequence_id, old, new)


def index_of(row: Sequence) -> int:
    """Where a row is in its slab."""
    assert row.slot is not None, f"sequence {row.sequence_id} has no slot"
    return row.slot.index
