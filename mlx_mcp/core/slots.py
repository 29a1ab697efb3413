"""Decides where rows keep their keys and values, and what that costs. Knows sizes and places, not what is in them.

A row has a slot: room for `capacity` tokens. Slots of one capacity lie in slabs, so that one call can compute the
attention of all rows of a slab. A row joins or leaves by taking or freeing a slot, which moves no other row. A slab is
freed with its last row.

    slab 1: capacity 128   [row a][row b][ free ][row c]
    slab 2: capacity 2048  [row d                      ]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

HEADROOM_TOKENS = 64  # a row gets at least so much room to grow, so that it does not have to move soon
MAX_SLAB_SLOTS = 16
MAX_SLAB_SHARE = 16  # a slab of several slots takes at most a sixteenth of all memory for keys and values
MAX_SHARED_CAPACITY = 2048  # longer rows have a slab each: one call per row costs them nothing


@dataclass(frozen=True)
class SlabSizes:
    """How many tokens slots have room for, and how many slots the first slab of a class has.

    Each slab costs some operations a layer in each step. A CPU does more work where slots are longer than their rows,
    and operations cost it little; of a GPU the reverse is true.
    """

    capacities: tuple[int, ...] = (128, 256, 512, 768, 1024, 1536, 2048)
    slab_tokens: int = 1024  # the first slab of a class is about this long: eight slots of 128 tokens
    regrouped: bool = False  # whether rows are moved so that a class has one slab, without gaps; see regrouping

    def capacity_for(self, num_tokens: int) -> int:
        """The capacity class for so many tokens. Long rows cost more, so that their classes are closer together."""
        for capacity in self.capacities:
            if num_tokens <= capacity:
                return capacity
        granule = max(512, 1 << (num_tokens.bit_length() - 4))
        return -(-num_tokens // granule) * granule


CPU_SLABS = SlabSizes()
GPU_SLABS = SlabSizes((512, 1024, 2048), regrouped=True)


@dataclass(frozen=True)
class KvCost:
    """How many bytes a row takes, whatever layers the model has."""

    token_bytes: int = 0  # per token of capacity: layers that keep every token
    windows: tuple[tuple[int, int], ...] = ()  # most tokens kept, bytes per token: layers that keep the last ones
    state_bytes: int = 0  # layers that keep a state of one size, and what is kept in reserve
    snapshot_bytes: int = 0  # a copy of such states for the cache
    padded: bool = False  # every row takes as much as the longest
    slabs: SlabSizes = CPU_SLABS

    def row_bytes(self, capacity: int) -> int:
        """The most that a row with room for `capacity` tokens takes."""
        return capacity * self.token_bytes + self.window_bytes(capacity) + self.state_bytes

    def cut_bytes(self, num_tokens: int, state: bool) -> int:
        """The exact size in the cache of `num_tokens` tokens, with the states after them if `state` is set."""
        snapshot = self.snapshot_bytes if state else 0
        return num_tokens * self.token_bytes + self.window_bytes(num_tokens) + snapshot

    def window_bytes(self, num_tokens: int) -> int:
        """The bytes in layers that keep the last tokens, for `num_tokens`. Rows that share the tokens each take it."""
        return sum(min(num_tokens, most) * each for most, each in self.windows)


@dataclass
class Ledger:
    """Bytes of keys and values, of live rows and cached blocks, of all models together; never above the limit."""

    limit_bytes: int
    used_bytes: int = 0
    set_aside_bytes: int = 0  # for blocks on their way to the disk; not within the limit
    # Evicts so many bytes of cached blocks; or evicts none, and returns False.
    reclaim: Callable[[int], bool] | None = field(default=None, repr=False, compare=False)
    # The pool whose model lacks memory to go on admitting. The others admit nothing meanwhile, or they could for ever
    # take what it lacks.
    reserved_for: SlotPool | None = field(default=None, repr=False, compare=False)

    def charge(self, num_bytes: int) -> bool:
        """Book bytes, and evict cached blocks for them; books nothing and returns False if they do not fit."""
        short = self.used_bytes + num_bytes - self.limit_bytes
        if short > 0 and not (self.reclaim is not None and self.reclaim(short)):
            return False
        self.used_bytes += num_bytes
        return True

    def refund(self, num_bytes: int) -> None:
        """Give booked bytes back."""
        assert num_bytes <= self.used_bytes, f"refund of {num_bytes} of {self.used_bytes} bytes"
        self.used_bytes -= num_bytes

    def check_integrity(self, num_bytes: int) -> None:
        """Prove that `num_bytes`, which is what all users hold together, are booked, and do not exceed the limit."""
        assert self.used_bytes == num_bytes, f"{self.used_bytes} bytes on the ledger, {num_bytes} accounted for"
        assert 0 <= self.used_bytes <= self.limit_bytes, f"{self.used_bytes} bytes of {self.limit_bytes}"


@dataclass(frozen=True)
class Slab:
    """Slots of one capacity. Each layer has one tensor for them."""

    slab_id: int
    capacity: int  # tokens per slot
    num_slots: int


@dataclass(frozen=True)
class Slot:
    """Where one row is."""

    slab: Slab
    index: int

    @property
    def capacity(self) -> int:
        """How many tokens it has room for."""
        return self.slab.capacity


@dataclass(frozen=True)
class SharedPrefix:
    """The first tokens of several rows, stored once for all of them. The rows' slots hold the tokens after them."""

    prefix_id: int
    num_tokens: int


@dataclass
class SlotPool:
    """The slabs of one model. Each is charged to the ledger while it exists."""

    ledger: Ledger
    cost: KvCost
    slabs: dict[int, Slab] = field(default_factory=dict)
    free: dict[int, set[int]] = field(default_factory=dict)  # slab id → free slots
    num_made: int = 0

    @property
    def used_bytes(self) -> int:
        """The bytes of the slabs, free slots included."""
        slabs = self.slabs.values()
        if self.cost.padded:
            longest = max((slab.capacity for slab in slabs), default=0)
            return len(slabs) * self.cost.row_bytes(longest)
        return sum(slab.num_slots * self.cost.row_bytes(slab.capacity) for slab in slabs)

    def take(self, num_tokens: int) -> Slot | None:
        """Take a slot for `num_tokens`, in the fullest slab of its class or in a new one; None if there is no room."""
        capacity = self.cost.slabs.capacity_for(num_tokens)
        shared = [i for i, slab in self.slabs.items() if slab.capacity == capacity and self.free[i]]
        # Where rows are regrouped, the largest slab is the one that they will be in.
        large = self.cost.slabs.regrouped
        slab_id = min(shared, key=lambda i: (-self.slabs[i].num_slots * large, len(self.free[i]), i), default=None)
        if slab_id is None:
            slab_id = self._make(capacity)
        if slab_id is None:
            return None
        return self.take_at(self.slabs[slab_id], min(self.free[slab_id]))

    def take_at(self, slab: Slab, index: int) -> Slot:
        """Take a free slot of a slab."""
        self.free[slab.slab_id].remove(index)
        return Slot(slab, index)

    def take_together(self, capacity: int, num_rows: int) -> list[Slot] | None:
        """Take the first slots of a new slab, which has some more; None if there is no room."""
        sizes = {min(num_rows + num_rows // 2 + 1, MAX_SLAB_SLOTS), num_rows}
        made = (self._add_slab(capacity, num_slots) for num_slots in sorted(sizes, reverse=True))
        slab = next((slab for slab in made if slab is not None), None)
        return None if slab is None else [self.take_at(slab, index) for index in range(num_rows)]

    def give_back(self, slot: Slot) -> None:
        """Free a slot, and its slab if no other row is in it."""
        slab, free = slot.slab, self.free[slot.slab.slab_id]
        assert slot.index not in free, f"double free of {slot}"
        free.add(slot.index)
        if len(free) == slab.num_slots:
            before = self.used_bytes
            del self.slabs[slab.slab_id], self.free[slab.slab_id]
            self.ledger.refund(before - self.used_bytes)

    def alone_bytes(self, num_tokens: int) -> int:
        """The bytes of one row of `num_tokens` if there is no other row."""
        return self.cost.row_bytes(self.cost.slabs.capacity_for(num_tokens))

    def check_integrity(self, held: list[Slot]) -> None:
        """Prove that the slots held are exactly those that are not free, and that the bytes add up."""
        assert len(set(held)) == len(held), "two rows in one slot"
        taken = {(i, n) for i, slab in self.slabs.items() for n in range(slab.num_slots)} - {
            (i, n) for i, free in self.free.items() for n in free
        }
        assert taken == {(slot.slab.slab_id, slot.index) for slot in held}, "slots held and slots taken differ"
        assert self.used_bytes <= self.ledger.used_bytes <= self.ledger.limit_bytes, "the ledger is wrong"

    def _make(self, capacity: int) -> int | None:
        """Make a slab as large as its class is already, or as large as fits; None if not even one slot fits."""
        in_class = sum(slab.num_slots for slab in self.slabs.values() if slab.capacity == capacity)
        num_slots = 1
        if capacity <= MAX_SHARED_CAPACITY and not self.cost.padded:
            # Free slots must not take much of what others, or cached blocks, could use.
            most = self.ledger.limit_bytes // MAX_SLAB_SHARE // max(1, self.cost.row_bytes(capacity))
            num_slots = max(1, min(MAX_SLAB_SLOTS, max(self.cost.slabs.slab_tokens // capacity, in_class), most))
        while num_slots:
            slab = self._add_slab(capacity, num_slots)
            if slab is not None:
                return slab.slab_id
            num_slots //= 2
        return None

    def _add_slab(self, capacity: int, num_slots: int) -> Slab | None:
        """Make a slab; None if it does not fit."""
        before, slab = self.used_bytes, Slab(self.num_made, capacity, num_slots)
        self.slabs[slab.slab_id] = slab
        if not self.ledger.charge(self.used_bytes - before):
            del self.slabs[slab.slab_id]
            return None
        self.num_made += 1
        self.free[slab.slab_id] = set(range(num_slots))
        return slab
