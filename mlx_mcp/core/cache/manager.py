"""The interface of a model's cached keys and values: what a sequence begins with, and what of it is cached.

While a sequence runs, every block that it fills is copied out of its row in the step that fills it, so that others can
begin with it at once. When it ends, what is left becomes a tail. A row is restored by copying. So no row refers to
blocks, and all of them may be evicted while rows run.

    tokens of a sequence    0 ........ 64 ....... 128 ...... 192 .. 201
    in the trees            [ block   ][ block   ][ block   ][ tail ]      the tail once it ends
    shared prefix           [ one copy for all rows]                        if enough sequences begin with it
    in its slot                                     [ the rest      ]

Knows no queues and no arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mlx_mcp.core.cache.blocks import Block, BlockHash, BlockPool
from mlx_mcp.core.cache.misses import Misses
from mlx_mcp.core.cache.prefixes import Match, PrefixCache, block_key, identity_of
from mlx_mcp.core.cache.publishing import Publishing
from mlx_mcp.core.cache.shared_prefixes import SharedPrefixes, Sharing
from mlx_mcp.core.cache.single_flight import SingleFlight
from mlx_mcp.core.cache.tiers import TierReads, Wanted
from mlx_mcp.core.cache.tracks import Track, track
from mlx_mcp.core.layout import Layout, Logits, Payload
from mlx_mcp.core.ports import StoredBlock, TierEntry
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import SlotPool
from mlx_mcp.core.steps import Chunk, Cut, Restore


class KvCacheManager:
    """The cached keys and values of one model, and the sequences that use them."""

    def __init__(
        self,
        cache: PrefixCache,
        slots: SlotPool,
        layout: Layout,
        fingerprint: bytes,
        chunk_tokens: int,
        sharing: Sharing | None = None,
    ) -> None:
        assert chunk_tokens % cache.block_tokens == 0, "a chunk must end where a block does"
        self.cache, self.slots, self.layout = cache, slots, layout
        self.fingerprint, self.chunk_tokens = fingerprint, chunk_tokens
        self.tracks: dict[Sequence, Track] = {}
        self.restoring: list[Block] = []  # the last blocks of prefixes to restore, until their step is launched
        self.single_flight, self.tier_reads = SingleFlight(cache), TierReads(cache, layout)
        self.publishing = Publishing(cache, slots.cost, layout, chunk_tokens)
        self.misses = Misses(cache.block_tokens)
        sharing = sharing or Sharing()
        min_rows = layout.sharing_rows if sharing.min_rows is None else sharing.min_rows
        self.shared = SharedPrefixes(
            cache.pool.ledger, slots.cost, min_rows if layout.sharing else 0, sharing.min_tokens
        )

    @property
    def pool(self) -> BlockPool:
        """The pool of all blocks."""
        return self.cache.pool

    @property
    def references(self) -> list[Block]:
        """The blocks that are acquired here, each as often as it is."""
        return [*self.restoring, *self.publishing.building.values()]

    @property
    def booked_bytes(self) -> int:
        """The bytes on the ledger for shared prefixes, and for cuts and logits that are not in blocks yet."""
        return self.shared.booked_bytes + self.publishing.booked_bytes

    def root(self, tenant: str) -> Block:
        """The root of a tenant's prefixes of this model."""
        identity = identity_of(self.fingerprint, self.cache.block_tokens, self.chunk_tokens, tenant)
        return self.pool.root(identity, self.cache.hash(BlockHash(identity), ()), block_key(identity, ()))

    # Sequences

    def enter(self, sequence: Sequence) -> None:
        """Add a sequence that waits."""
        self.tracks[sequence] = track(self.cache, self.root(sequence.tenant), sequence)
        self.single_flight.enter(self.tracks[sequence])

    def leave(self, sequence: Sequence) -> None:
        """Free what a running sequence holds here. It may be admitted again. Its slot is for the caller to free."""
        self.single_flight.stop(self.tracks[sequence])
        self.shared.leave(sequence)
        self.publishing.stop(sequence)

    def exit(self, sequence: Sequence) -> None:
        """Forget a sequence that neither waits nor runs any more."""
        self.single_flight.exit(self.tracks.pop(sequence))
        self.tier_reads.exit(sequence)
        self.publishing.exit(sequence)

    def is_waiting(self, sequence: Sequence) -> bool:
        """Whether a sequence still waits for the sequence or the tier for which `wait` last made it wait."""
        return sequence in self.tier_reads.fetching or self.single_flight.is_waiting(sequence)

    def wait(self, sequence: Sequence) -> bool:
        """Have a sequence wait if a running one or a tier will soon bring its next tokens; returns whether it waits."""
        return sequence in self.tier_reads.fetching or self.single_flight.wait(self.tracks[sequence])

    def admit(self, sequence: Sequence, num_tokens: int) -> Restore | None:
        """Give a sequence a slot with room for `num_tokens`, and return what to restore; None if there is no memory."""
        track = self.tracks[sequence]
        match = track.match(self.cache, self.layout)
        if not self._place(track, match, num_tokens):
            # The blocks that it would begin with may take the room that it needs.
            if not self._place(track, Match((), 0, 0), num_tokens):
                return None
            match = track.match(self.cache, self.layout)
            self._protect(match)
        sequence.num_computed = match.num_tokens
        self.publishing.start(track, match)
        self.single_flight.start(track, match.num_tokens // self.cache.block_tokens)
        if match.blocks:
            self.pool.touch(match.blocks[-1])
            match.blocks[-1].num_hits += 1
        if not sequence.ephemeral:
            for block in match.blocks:
                block.private = False
        if not sequence.num_preemptions:
            self._explain(track, match)
        assert match.num_tokens < sequence.num_tokens or match.logits is not None, "nothing is left to compute"
        ends = match.logits is not None and len(sequence.output_ids) + 1 >= sequence.params.max_tokens
        if ends and match.blocks[-1].end == match.num_tokens:  # else its end has yet to become a block of its own
            return Restore(sequence.sequence_id, (), 0, match.logits)
        return Restore(sequence.sequence_id, match.parts, match.num_tokens, match.logits)

    def _place(self, track: Track, match: Match, num_tokens: int) -> bool:
        """Take a slot, and keep everything matched from being evicted; returns whether there was a slot."""
        sequence = track.sequence
        self._protect(match)
        self.shared.join(track, match, self.single_flight.users, self.cache.block_tokens)
        sequence.slot = self.slots.take(num_tokens - sequence.num_shared)
        if sequence.slot is None:
            self.shared.leave(sequence)
            if match.blocks:
                self.pool.release(self.restoring.pop())
        return sequence.slot is not None

    def _protect(self, match: Match) -> None:
        """Keep what was matched from being evicted, until `release_restored`."""
        if match.blocks:
            self.pool.acquire(match.blocks[-1])
            self.restoring.append(match.blocks[-1])

    def _explain(self, track: Track, match: Match) -> None:
        """Note how much of a sequence was cached when it was first admitted, and why not more."""
        sequence = track.sequence
        sequence.num_cached = match.num_tokens
        sequence.num_restored = self.tier_reads.num_restored(sequence, match.num_tokens)
        passed_over = sequence in self.tier_reads.computing
        whose = track.root, sequence.principal
        sequence.miss = self.misses.explain(
            whose, sequence.prompt_ids, match, sequence.num_kept, sequence.other_model, passed_over
        )

    # Tiers

    def wanted(self, sequence: Sequence, find: Callable[[bytes], TierEntry | None]) -> list[Wanted]:
        """See TierReads.wanted."""
        return self.tier_reads.wanted(self.tracks[sequence], find)

    def pass_over(self, sequence: Sequence) -> None:
        """Note that a sequence computes what a tier has, because that is faster."""
        self.tier_reads.computing.add(sequence)

    def fetch(self, sequence: Sequence) -> None:
        """Have a waiting sequence wait for blocks from a tier, until `add_restored`."""
        self.tier_reads.fetching.add(sequence)

    def add_restored(self, sequence: Sequence, blocks: list[tuple[StoredBlock, Payload]]) -> None:
        """Put blocks from a tier into the trees as far as there is room, and have the sequence wait no longer.

        The sequence may have ended by now; others may need the blocks all the same.
        """
        tokens = self.tier_reads.add_restored(sequence, self.root(sequence.tenant), blocks)
        if sequence in self.tracks:
            self.tier_reads.finish(sequence, tokens)

    # What is cached

    def plan_cuts(self, chunks: Iterable[Chunk], decode: Iterable[tuple[int, int]]) -> tuple[Cut, ...]:
        """See Publishing.plan_cuts."""
        return self.publishing.plan_cuts(chunks, decode, self.single_flight.users)

    def commit(self, cuts: tuple[Cut, ...], payloads: dict[Cut, Payload]) -> None:
        """Put the payloads of a step's cuts into the trees. Call it when the step's tokens were taken."""
        self.release_restored()
        self.publishing.commit(cuts, payloads)

    def abandon(self, *steps: tuple[Cut, ...]) -> None:
        """Refund the cuts of steps that failed."""
        for cuts in steps:
            self.commit(cuts, {})

    def release_restored(self) -> None:
        """Release the blocks that rows are restored from: the step refers to their payloads."""
        for block in self.restoring:
            self.pool.release(block)
        self.restoring.clear()

    def remember(self, sequence: Sequence, logits: Logits) -> None:
        """See Publishing.remember."""
        self.publishing.remember(sequence, logits)

    def finish(self, sequence: Sequence, cut: Callable[[int, int, bool], Payload], exact: bool = True) -> Block | None:
        """See Publishing.finish."""
        return self.publishing.finish(self.tracks[sequence], cut, exact)

    def forget_blocks(self, sequence: Sequence) -> None:
        """See Publishing.forget_blocks."""
        self.publishing.forget_blocks(sequence)

    def check_integrity(self, running: list[Sequence], waiting: list[Sequence]) -> None:
        """Prove that trees, references, users and shared prefixes agree with the sequences there are."""
        assert set(self.tracks) == {*running, *waiting}, "tracks of sequences that are gone, or none of one that lives"
        self.single_flight.check_integrity(self.tracks.values(), running)
        self.shared.check_integrity(running, waiting)
        self.tier_reads.check_integrity(self.tracks.values())
        self.publishing.check_integrity(running, waiting)
