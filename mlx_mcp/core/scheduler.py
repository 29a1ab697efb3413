"""Decides which sequences run next. Knows nothing of text, threads or MLX.

A step holds every decoding sequence and prefill chunks within a token budget, so that a long prompt delays the others'
next token by one chunk and no more. Sequences that wait are in lanes: one for each session, for each call without one,
or as the caller says (`lanes.py`). A sequence is admitted when its keys and values so far fit in memory. When one
outgrows what is left, the youngest is preempted: it keeps its tokens, and is computed again when there is room.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace

from mlx_mcp.core.cache.manager import KvCacheManager
from mlx_mcp.core.lanes import Lanes, PrefillOrder, group_of
from mlx_mcp.core.layout import Payload
from mlx_mcp.core.prefill import Prefill, PrefillBudget
from mlx_mcp.core.regrouping import regroup
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import HEADROOM_TOKENS, SlotPool
from mlx_mcp.core.steps import Admission, Chunk, Cut, Decode, Move, Restore, Step
from mlx_mcp.errors import CapacityError, RequestTooLarge

RETRY_AFTER_S = 5


@dataclass(frozen=True)
class Limits:
    """What one scheduler may hold.

    A chunk ends at a multiple of `chunk_tokens`, whatever the budget: a prompt is always split at the same places, so
    that the same prompt gives the same keys and values. Only the last chunk ends elsewhere. A budget is at least one
    chunk.
    """

    max_running: int = 16
    max_waiting: int = 1024
    chunk_tokens: int = 128
    prefill_tokens_idle: int = 512  # per step, while nothing decodes
    prefill_tokens_busy: int = 128  # per step, while something decodes or begins to
    prefill_wait_s: float | None = None  # the budget while something decodes follows this; see PrefillBudget

    def __post_init__(self) -> None:
        """Refuse a budget that no chunk would ever fit."""
        assert min(self.prefill_tokens_idle, self.prefill_tokens_busy) >= self.chunk_tokens, "a budget below a chunk"

    def reading(self, prefill: Prefill | None) -> Limits:
        """The same limits, with prompts read in this way, if one is given."""
        if prefill is None:
            return self
        return replace(
            self,
            chunk_tokens=prefill.chunk_tokens,
            prefill_tokens_idle=prefill.idle_tokens,
            prefill_tokens_busy=prefill.busy_tokens,
            prefill_wait_s=prefill.wait_s,
        )


@dataclass
class Changes:
    """Which rows begin, move and give up their slots before a step."""

    released: list[int] = field(default_factory=list)  # sequence ids
    admitted: dict[Sequence, Restore | None] = field(default_factory=dict)
    moves: dict[Sequence, Move] = field(default_factory=dict)


@dataclass
class Scheduler:
    """The waiting and the running sequences of one model. Without a cache they share nothing."""

    limits: Limits
    pool: SlotPool
    cache: KvCacheManager | None = None
    running: list[Sequence] = field(default_factory=list)  # in order of admission
    waiting: Lanes = field(default_factory=Lanes)
    prefill_order: PrefillOrder = field(default_factory=PrefillOrder)
    # Whether every place is taken and nobody gives one up, until a sequence leaves or comes.
    blocked: bool = False
    busy: PrefillBudget = field(init=False)  # how many tokens of prompts a step computes while something decodes

    def __post_init__(self) -> None:
        """Begin with the budget of the limits."""
        its = self.limits
        most = max(its.prefill_tokens_idle, its.prefill_tokens_busy)
        self.busy = PrefillBudget(its.prefill_tokens_busy, its.chunk_tokens, most, its.prefill_wait_s)

    @property
    def num_waiting(self) -> int:
        """The number of sequences that hold no place."""
        return len(self.waiting)

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence that has not ended."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its lane's queue.

        Raises:
            RequestTooLarge: it would not fit in memory if it were alone.
            CapacityError: every place is taken, and `max_waiting` sequences of its principal's group wait for one.
        """
        limit_bytes, need_bytes = self.pool.ledger.limit_bytes, self.pool.alone_bytes(sequence.max_length)
        if need_bytes > limit_bytes:
            prompt = len(sequence.prompt_ids)
            most = bisect_right(range(sequence.max_length), limit_bytes, key=self.pool.alone_bytes) - 1
            raise RequestTooLarge(prompt, need_bytes, limit_bytes, most - prompt)
        # By group: one that fills its own queue shuts nobody else out.
        waiting = sum(group_of(s) == group_of(sequence) for s in self.waiting)
        if waiting + len(self.running) >= self.limits.max_running + self.limits.max_waiting:
            raise CapacityError(
                f"{len(self.running)} calls are running and {waiting} waiting, as many as are allowed.",
                RETRY_AFTER_S,
            )
        self.waiting.append(sequence)
        self.blocked = False
        if self.cache is not None:
            self.cache.enter(sequence)

    def schedule(self) -> Step:
        """Make room for those that grow, admit what fits, and choose the next step's work."""
        changes = Changes()
        self._grow(changes)
        self._admit(changes)
        if self.pool.cost.slabs.regrouped:
            settled = (s for s in self.running if s not in changes.admitted and s not in changes.moves)
            changes.moves.update(regroup(self.pool, settled))
        decoding = [sequence for sequence in self.running if sequence.decoding]
        chunks = self._chunks(busy=bool(decoding))
        return Step(
            chunks,
            tuple(Decode(sequence.sequence_id, sequence.output_ids[-1]) for sequence in decoding),
            tuple(changes.moves.values()),
            tuple(r for r in changes.admitted.values() if r is not None and r.brings_anything),
            self._cuts(chunks, [(sequence.sequence_id, sequence.num_computed + 1) for sequence in decoding]),
            tuple(admission(sequence) for sequence in changes.admitted),
            tuple(changes.released),
        )

    def schedule_ahead(self, step: Step) -> Step | None:
        """The step after `step`, whose tokens are not known yet; None if it would do more than decode the same rows.

        If a sequence turns out to have ended, the step computes its row for nothing.
        """
        if self.waiting and not self.blocked:
            return None
        drawing, repeating = set(step.drawing), set(step.repeating)
        if any(s.sequence_id not in drawing for s in self.running):
            return None
        running = {s.sequence_id: s for s in self.running}
        drawn = [running[i] for i in step.drawing if i in running]
        going = [s for s in drawn if len(s.output_ids) + 1 < s.params.max_tokens]
        if not going or not all(s.slot is not None and s.num_tokens - s.num_shared < s.slot.capacity for s in going):
            return None
        # Rows that get a token without a pass are no further after the step than they are known to be.
        ends = [(s.sequence_id, s.num_computed + 1 + (s.sequence_id not in repeating)) for s in going]
        return Step(decode=tuple(Decode(s.sequence_id, None) for s in going), cuts=self._cuts((), ends))

    def measure(self, step: Step, seconds: float) -> None:
        """Take the time of a step, for the budget of the next ones."""
        if step.prefill and step.decode:
            self.busy.measure(sum(chunk.end - chunk.start for chunk in step.prefill), seconds)

    def commit(self, step: Step, tokens: dict[int, int], payloads: dict[Cut, Payload] | None = None) -> tuple[int, ...]:
        """Take a step's new tokens, by sequence id, and the payloads of its cuts; returns the sequences that ended.

        These still have their rows, so that their ends can be cached. Whoever has cached them calls `remove`.
        """
        running = {s.sequence_id: s for s in self.running}  # of a step that was run ahead some may have ended meanwhile
        for chunk in step.prefill:
            if chunk.sequence_id in running:
                running[chunk.sequence_id].num_computed = chunk.end
        for sequence_id in step.decoding:
            if sequence_id in running:
                running[sequence_id].num_computed += 1
        drawn = [running[i] for i in step.drawing if i in tokens and i in running]
        for sequence in drawn:
            sequence.append(tokens[sequence.sequence_id])
        if self.cache is not None:
            self.cache.commit(step.cuts, payloads or {})
        return tuple(sequence.sequence_id for sequence in drawn if sequence.finish_reason is not None)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is: finished, cancelled or failed."""
        if sequence in self.running:
            self._leave(sequence)
        elif self.waiting.remove(sequence):
            if not self.waiting:
                self._give_up_reservation()
        else:
            return
        if self.cache is not None:
            self.cache.exit(sequence)

    def abandon(self, *steps: Step) -> None:
        """Undo what was planned for steps that failed, and have every running sequence computed again."""
        if self.cache is not None:
            self.cache.abandon(*(step.cuts for step in steps))
        self.preempt_all()

    def preempt_all(self) -> None:
        """Have every running sequence computed again from its tokens, in the same order."""
        for sequence in reversed(list(self.running)):
            self._preempt(sequence, Changes())

    def num_ahead(self, sequence: Sequence) -> int:
        """See Lanes.num_ahead; 0 once it runs."""
        return self.waiting.num_ahead(sequence)

    def check_integrity(self) -> None:
        """Prove that every running sequence has a slot, every waiting one none, and that the pool agrees."""
        self.waiting.check_integrity()
        slots = [s.slot for s in self.running if s.slot is not None]
        assert len(slots) == len(self.running), "a running sequence has no slot"
        self.prefill_order.check_integrity(self.running)
        self.pool.check_integrity(slots)
        if self.cache is not None:
            self.cache.check_integrity(self.running, list(self.waiting))

    # Memory

    def _grow(self, changes: Changes) -> None:
        """Give each sequence that is full a larger slot. Preempt the youngest for it, at last the sequence itself."""
        for sequence in list(self.running):
            old = sequence.slot
            if old is None or sequence.num_tokens - sequence.num_shared <= old.capacity:
                continue
            need = self._need(sequence) - sequence.num_shared
            new = self.pool.take(need)
            while new is None and sequence in self.running:
                self._preempt(self.running[-1], changes)
                new = self.pool.take(need) if sequence in self.running else None
            if new is not None:
                # Only after the copy is the old slot free, but the runner copies before anything else is written.
                self.pool.give_back(old)
                sequence.slot = new
                changes.moves[sequence] = Move(sequence.sequence_id, old, new)

    def _need(self, sequence: Sequence) -> int:
        """How many tokens to have room for: those that are there and some more, the more the longer it decodes."""
        some = max(HEADROOM_TOKENS, sequence.num_tokens // 4) if sequence.output_ids else HEADROOM_TOKENS
        return min(sequence.num_tokens + some, sequence.max_length)

    def _preempt(self, sequence: Sequence, changes: Changes) -> None:
        """Take a sequence's slot. It is served next in its lane, and its lane is served next of all."""
        self._leave(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.waiting.prepend(sequence)
        changes.released.append(sequence.sequence_id)
        changes.admitted.pop(sequence, None)
        changes.moves.pop(sequence, None)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        assert sequence.slot is not None, f"sequence {sequence.sequence_id} ran without a slot"
        if self.cache is not None:
            self.cache.leave(sequence)
        self.pool.give_back(sequence.slot)
        sequence.slot = None
        self.blocked = False
        self.prefill_order.leave(sequence, self.running)

    # Places

    def _admit(self, changes: Changes) -> None:
        """Admit the first sequence of one lane after another, as long as there are places and memory.

        The principal that runs the fewest sequences is served first, and of its groups the one that does. If the lane
        that is served next does not fit, the others wait with it: small sequences, of this model or another, must not
        overtake it for ever. A principal that runs nothing gets a place of the one that runs the most, and so does a
        group, and a lane. A lane that waits for something other than a place is passed over, and stays where it is in
        the order.
        """
        ledger = self.pool.ledger
        while self.waiting and (ledger.reserved_for is None or ledger.reserved_for is self.pool):
            lane = self.waiting.choose_next(self.running, self._must_wait)
            if lane is None:
                self._give_up_reservation()
                return
            full = len(self.running) >= self.limits.max_running
            if full or not self._place(self.waiting.first(lane), changes):
                lane = self._make_place(changes)
                if lane is None:
                    self.blocked = full
                    if not full:
                        ledger.reserved_for = self.pool
                    return
                if not self._place(self.waiting.first(lane), changes):
                    return
            sequence = self.waiting.pop(lane)
            self.running.append(sequence)
            self._give_up_reservation()
            self.prefill_order.admit(sequence)

    def _must_wait(self, sequence: Sequence) -> bool:
        """Whether it must wait for something other than a place: for a prefix to come, or for pinned blocks to go."""
        if self.cache is None:
            return False
        free = self.pool.ledger.limit_bytes - self.cache.pool.protected_bytes
        return self.pool.alone_bytes(self._need(sequence)) > free or self.cache.wait(sequence)

    def _place(self, sequence: Sequence, changes: Changes) -> bool:
        """Give a sequence a slot, and note what its row begins with; False if there is no memory."""
        restore = None
        if self.cache is None:
            sequence.slot = self.pool.take(self._need(sequence))
        else:
            restore = self.cache.admit(sequence, self._need(sequence))
        if sequence.slot is None:
            return False
        changes.admitted[sequence] = restore
        return True

    def _give_up_reservation(self) -> None:
        if self.pool.ledger.reserved_for is self.pool:
            self.pool.ledger.reserved_for = None

    def _make_place(self, changes: Changes) -> str | None:
        """Preempt a sequence for a lane that runs nothing; returns the lane, None if none gets a place in this way."""
        found = self.waiting.choose_victim(self.running, self._must_wait)
        if found is None:
            return None
        lane, victim = found
        victim.made_place = True
        self._preempt(victim, changes)
        self.waiting.move_to_end(victim.lane)
        return lane

    # Work

    def _cuts(self, chunks: tuple[Chunk, ...], decode: list[tuple[int, int]]) -> tuple[Cut, ...]:
        """Cuts of the blocks that are filled by these chunks, and by these rows (id, tokens after the step)."""
        return () if self.cache is None else self.cache.plan_cuts(chunks, decode)

    def _chunks(self, busy: bool) -> tuple[Chunk, ...]:
        """Prefill chunks within the budget; each goes to the lane that was not served for longest.

        A chunk that yields a first token makes the step a busy one, so that this token does not wait for the prompts
        of others.
        """
        budget = self.busy.tokens if busy else self.limits.prefill_tokens_idle
        used = 0
        starts = {s: s.num_computed for s in self.running if not s.decoding and s.num_computed < s.num_tokens}
        chunks: list[Chunk] = []
        while starts:
            # The first admitted of a lane.
            sequence = min(starts, key=self.prefill_order.rank)
            start, size = starts[sequence], self.limits.chunk_tokens
            # What is left after a cached prefix is not split once more where it crosses a boundary.
            left = sequence.num_tokens - start
            end = start + left if left <= size else (start // size + 1) * size
            if used + end - start > budget:
                break
            used += end - start
            chunks.append(Chunk(sequence.sequence_id, start, end, last=end == sequence.num_tokens))
            self.prefill_order.serve(sequence)
            starts[sequence] = end
            if end == sequence.num_tokens:
                del starts[sequence]
                budget = self.busy.tokens
        return tuple(chunks)


def admission(sequence: Sequence) -> Admission:
    """What a runner must know of a sequence that has just been given its slot."""
    assert sequence.slot is not None, f"sequence {sequence.sequence_id} is admitted without a slot"
    return Admission(
        sequence.sequence_id,
        sequence.prompt_ids,
        tuple(sequence.output_ids),
        sequence.params,
        sequence.stop_ids,
        sequence.slot,
        sequence.prefix,
    )
