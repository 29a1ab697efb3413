"""Where the rows of a decoding batch are in the slabs: made once a step, and used by every FULL layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import mlx.core as mx

from mlx_mcp.core.slots import SharedPrefix, Slab, Slot
from mlx_mcp.mlx_backend.slabs import num_shared


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of the batch, n of them, that are in neighbouring slots of one slab and share their prefix.

    Each row's tokens, in the order in which it attends to them; `tokens` in all:

        [0 ... prefix.num_tokens) once for all rows   [prefix.num_tokens ... tokens) in its slot, from 0
    """

    slab: Slab
    prefix: SharedPrefix | None
    rows: slice  # where they are in the batch
    where: slice  # where they are in the slab
    longest: int  # tokens of a slot to attend to, this step's included
    slots: mx.array  # [n, 1]
    positions: mx.array  # [n, 1]: where in its slot each row's token of this step goes
    mask: mx.array | None  # [n, 1, 1, longest]: each row's own tokens in its slot; None where all are equally long

    @property
    def num_rows(self) -> int:
        """The number of its rows."""
        return int(self.rows.stop - self.rows.start)

    def masks(self, window: int | None) -> list[mx.array | None]:
        """Each row's own last `window` tokens, [n, 1, 1, …]: of its prefix, if it has one, and of its slot."""
        shared = num_shared(self.prefix)
        if window is None:
            return [None, self.mask] if shared else [self.mask]
        tokens, last = mx.arange(-shared, self.longest), self.positions
        mask = ((tokens <= last) & (tokens > last - window))[:, None, None]
        return [mask[..., :shared], mask[..., shared:]] if shared else [mask]


@dataclass(frozen=True)
class Placement:
    """Where a batch's rows are."""

    runs: list[Run]
    by_prefix: dict[SharedPrefix | None, list[Run]]
    offsets: mx.array  # [rows]: the position of each row's token
    heads: dict[int, mx.array] = field(default_factory=dict)  # by their number, [1, kv_heads]: 0, 1, 2 …

    def all_heads(self, kv_heads: int) -> mx.array:
        """An index of all heads, [1, kv_heads]: made once a step, for a scatter that needs no other operation."""
        if kv_heads not in self.heads:
            self.heads[kv_heads] = mx.array([list(range(kv_heads))])
        return self.heads[kv_heads]


def place(rows: list[tuple[Slot, int, SharedPrefix | None]]) -> Placement:
    """The placement of rows of slot, length (its prefix included) and prefix, in order of slab and slot."""
    runs: list[Run] = []
    by_prefix: dict[SharedPrefix | None, list[Run]] = {}
    for (slab, _, prefix), group in groupby(
        enumerate(rows), lambda pair: (pair[1][0].slab, pair[1][0].index - pair[0], pair[1][2])
    ):
        members = list(group)
        row, (slot, _, _) = members[0]
        n, lengths = len(members), [length - num_shared(prefix) for _, (_, length, _) in members]
        positions, longest = mx.array([[length] for length in lengths]), max(lengths) + 1
        mask = None
        if min(lengths) + 1 < longest:
            mask = (mx.arange(longest) <= positions)[:, None, None]
        where = slice(slot.index, slot.index + n)
        slots = mx.array([[i] for i in range(where.start, where.stop)])
        runs.append(Run(slab, prefix, slice(row, row + n), where, longest, slots, positions, mask))
        by_prefix.setdefault(prefix, []).append(runs[-1])
    return Placement(runs, by_prefix, mx.array([length for _, length, _ in rows]))
