"""Keeps the recurrent states of rows that decode together in one tensor for each STATE layer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache


class JoinedStates:
    """The states of some rows, by layer; `layers` are the places of the STATE layers among a row's caches."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.ids: list[int] = []  # the sequences whose states are joined, in the order of the tensors' rows
        self.caches: dict[int, Any] = {}  # place → ArraysCache of [rows, …]

    @property
    def nbytes(self) -> int:
        """The bytes of all states."""
        return sum(int(cache.nbytes) for cache in self.caches.values())

    @property
    def arrays(self) -> list[Any]:
        """All tensors."""
        return [cache.state for cache in self.caches.values()]

    def join(self, ids: list[int], own: dict[int, list[Any]]) -> None:
        """Join the states of these sequences in this order; no work while they are the same.

        The states of sequences that were not joined are taken out of their `own` caches; those of sequences that were,
        and are not in `ids`, are forgotten.
        """
        if ids == self.ids or not self.layers:
            return
        rows = {sequence_id: row for row, sequence_id in enumerate(self.ids)}
        self.caches = {
            i: join_states([self.caches[i].extract(rows[j]) if j in rows else own[j][i] for j in ids])
            for i in self.layers
        }
        self.ids = list(ids)
        for j in ids:
            own[j] = [None if i in self.caches else cache for i, cache in enumerate(own[j])]

    def extract(self, sequence_id: int, i: int) -> Any:
        """The states of one row in one layer."""
        return self.caches[i].extract(self.ids.index(sequence_id))

    def remove(self, sequence_id: int) -> None:
        """Forget a row's states, if they are joined."""
        if sequence_id not in self.ids:
            return
        rest = [row for row, i in enumerate(self.ids) if i != sequence_id]
        self.ids, self.caches = [self.ids[row] for row in rest], self.caches if rest else {}
        for cache in self.caches.values():
            cache.filter(rest)


def join_states(rows: list[Any]) -> Any:
    """The states of rows, each an ArraysCache of [1, …], in one of [rows, …]."""
    joined = ArraysCache(len(rows[0].cache))
    for i, parts in enumerate(zip(*(row.cache for row in rows), strict=True)):
        joined[i] = mx.concatenate(list(parts))
    return joined
