"""Holds the rows of models that run on mlx-lm's batch caches, which pad every row to the longest."""

from __future__ import annotations

from typing import Any, cast

from mlx_lm.models.cache import BatchKVCache, KVCache

from mlx_mcp.core.slots import KvCost
from mlx_mcp.mlx_backend.cache_tree import leaves
from mlx_mcp.mlx_backend.layers import Codec
from mlx_mcp.mlx_backend.rows import Batch, Rows


class PaddedRows(Rows):
    """Rows in mlx-lm's batch caches: every row is as long as the longest, and is copied when rows join or leave."""

    def __init__(self, model: Any, cost: KvCost, codec: Codec) -> None:
        super().__init__(model, cost, codec)
        self.members: list[int] = []  # sequence ids
        self.batch: list[Any] = []

    @property
    def nbytes(self) -> int:
        """See Rows.nbytes."""
        return super().nbytes + sum(int(cache.nbytes) for cache in self.batch)

    def batches(self, sequence_ids: list[int]) -> list[Batch]:
        """One batch: rows that left are taken out of it, and new ones are merged in."""
        if not sequence_ids:
            return []
        for row, member in enumerate(self.members):  # it may still be cut: extract computes nothing yet
            if member not in sequence_ids and member in self.lengths.keys() - self.own.keys():
                self.own[member] = [cache.extract(row) for cache in self.batch]
        # A row that was computed again has caches of its own since, and counts as new.
        stays = [member in sequence_ids and member not in self.own for member in self.members]
        stay = [i for i, member_stays in enumerate(stays) if member_stays]
        if not stay:
            self.batch = []
        elif len(stay) < len(self.members):
            for cache in self.batch:
                cache.filter(stay)
        self.members = [self.members[i] for i in stay]
        new = [sequence_id for sequence_id in sequence_ids if sequence_id not in self.members]
        if new:
            rows = zip(*(self.own.pop(sequence_id) for sequence_id in new), strict=True)
            merged = [caches[0].merge(list(caches)) for caches in rows]
            for cache, more in zip(self.batch, merged, strict=bool(self.batch)):
                cache.extend(more)
            self.batch = self.batch or merged
            self.members += new
        for sequence_id in sequence_ids:
            self.lengths[sequence_id] += 1
        return [(self.members, self.batch)]

    def arrays(self, sequence_ids: list[int]) -> list[Any]:
        """See Rows.arrays."""
        return super().arrays(sequence_ids) + [cache.state for cache in self.batch]

    def release(self, sequence_id: int) -> bool:
        """See Rows.release. While other rows are in the batch, the row is taken out of it at the next step."""
        existed = super().release(sequence_id)
        if not any(member in self.lengths and member not in self.own for member in self.members):
            self.members, self.batch = [], []
        return existed

    def _leaf(self, sequence_id: int, i: int) -> Any:
        """See Rows._leaf."""
        if sequence_id in self.own:
            return super()._leaf(sequence_id, i)
        row = self.members.index(sequence_id)
        cache = leaves(self.batch)[i]
        kind = type(cache)
        if kind is not BatchKVCache:
            return cache.extract(row)
        alone = cast(Any, KVCache)()  # mlx-lm's extract copies it all, for a few tokens
        start, end = cache._idx - self.lengths[sequence_id], cache._idx
        alone.keys, alone.values = (x[row : row + 1, :, start:end] for x in (cache.keys, cache.values))
        return alone
