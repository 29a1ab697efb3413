"""The one door to a model's cached keys and values: what a sequence begins with, and what is kept of it.

While a sequence runs, every block that it fills is cut out of its row in the step that fills it, so that others can
begin with it at once; when it ends, what is left becomes a tail. A row is restored by copying: no row holds on to
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
    """What one model's sequences share."""

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
        self.restoring: list[Block] = []  # the blocks that rows are restored from, until a step has been launched
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
        """The blocks."""
        return self.cache.pool

    @property
    def references(self) -> list[Block]:
        """The blocks that are referred to here, each as often as it is."""
        return [*self.restoring, *self.publishing.building.values()]

    @property
    def booked_bytes(self) -> int:
        """What is on the ledger beside blocks and slots: shared prefixes, cuts and logits on their way to blocks."""
        return self.shared.booked_bytes + self.publishing.booked_bytes

    def root(self, tenant: str) -> Block:
        """Where a tenant's prefixes of this model begin."""
        identity = identity_of(self.fingerprint, self.cache.block_tokens, self.chunk_tokens, tenant)
        return self.pool.root(identity, self.cache.hash(BlockHash(identity), ()), block_key(identity, ()))

    # Sequences come and go

    def enter(self, sequence: Sequence) -> None:
        """Count in a sequence that waits."""
        self.tracks[sequence] = track(self.cache, self.root(sequence.tenant), sequence)
        self.single_flight.enter(self.tracks[sequence])

    def leave(self, sequence: Sequence) -> None:
        """Take back what a running sequence holds; it may be admitted again. Its slot is its own affair."""
        self.single_flight.stop(self.tracks[sequence])
        self.shared.leave(sequence)
        self.publishing.stop(sequence)

    def exit(self, sequence: Sequence) -> None:
        """Count out a sequence that neither waits nor runs any more."""
        self.single_flight.exit(self.tracks.pop(sequence))
        self.tier_reads.exit(sequence)
        self.publishing.exit(sequence)

    def is_waiting(self, sequence: Sequence) -> bool:
        """Whether the sequence or the tier that this one was last seen to wait for has not brought it yet."""
        return sequence in self.tier_reads.fetching or self.single_flight.is_waiting(sequence)

    def wait(self, sequence: Sequence) -> bool:
        """Have a sequence wait if a running one or a tier is about to bring what it needs next; returns whether so."""
        return sequence in self.tier_reads.fetching or self.single_flight.wait(self.tracks[sequence])

    def admit(self, sequence: Sequence, num_tokens: int) -> Restore | None:
        """Give a sequence a slot with room for `num_tokens`, and what is cached of it; None if there is no memory."""
        track = self.tracks[sequence]
        match = track.match(self.cache, self.layout)
        if not self._place(track, match, num_tokens):
            # What is cached of it may be what takes the room.
            if not self._place(track, Match((), 0, 0), num_tokens):
                return None
            match = track.match(self.cache, self.layout)
            self._hold(match)
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
        return Restore(sequence.sequence_id, match.parts, match.num_tokens, match.logits)

    def _place(self, track: Track, match: Match, num_tokens: int) -> bool:
        """Take a slot while everything matched is kept."""
        sequence = track.sequence
        self._hold(match)
        self.shared.join(track, match, self.single_flight.users, self.cache.block_tokens)
        sequence.slot = self.slots.take(num_tokens - sequence.num_shared)
        if sequence.slot is None:
            self.shared.leave(sequence)
            if match.blocks:
                self.pool.release(self.restoring.pop())
        return sequence.slot is not None

    def _hold(self, match: Match) -> None:
        """Have what was matched stay until it was `launched`."""
        if match.blocks:
            self.pool.acquire(match.blocks[-1])
            self.restoring.append(match.blocks[-1])

    def _explain(self, track: Track, match: Match) -> None:
        """Note what a sequence found when it was first admitted, and why not more."""
        sequence = track.sequence
        sequence.num_cached = match.num_tokens
        sequence.num_restored = self.tier_reads.num_restored(sequence, match.num_tokens)
        passed_over = sequence in self.tier_reads.computing
        sequence.miss = self.misses.explain(
            track.root, sequence.prompt_ids, match, sequence.num_kept, sequence.other_model, passed_over
        )

    # What tiers have

    def wanted(self, sequence: Sequence, find: Callable[[bytes], TierEntry | None]) -> list[Wanted]:
        """See TierReads.wanted."""
        return self.tier_reads.wanted(self.tracks[sequence], find)

    def pass_over(self, sequence: Sequence) -> None:
        """Note that a sequence computes what a tier has, since that is sooner done."""
        self.tier_reads.computing.add(sequence)

    def fetch(self, sequence: Sequence) -> None:
        """Have a waiting sequence wait for blocks from a tier, until they have `arrived`."""
        self.tier_reads.fetching.add(sequence)

    def add_restored(self, sequence: Sequence, blocks: list[tuple[StoredBlock, Payload]]) -> None:
        """Put blocks from a tier into the trees as far as there is room, and have the sequence wait no more.

        The sequence may be gone by now; others may want them all the same.
        """
        tokens = self.tier_reads.add_restored(sequence, self.root(sequence.tenant), blocks)
        if sequence in self.tracks:
            self.tier_reads.finish(sequence, tokens)

    # What is kept

    def plan_cuts(self, chunks: Iterable[Chunk], decode: Iterable[tuple[int, int]]) -> tuple[Cut, ...]:
        """The blocks that a step fills; see Publishing.plan_cuts."""
        return self.publishing.plan_cuts(chunks, decode, self.single_flight.users)

    def commit(self, cuts: tuple[Cut, ...], payloads: dict[Cut, Payload]) -> None:
        """Put what a step has cut into the trees; what cannot be is refunded. Call it when tokens are taken."""
        self.release_restored()
        self.publishing.commit(cuts, payloads)

    def abandon(self, *steps: tuple[Cut, ...]) -> None:
        """Take back what was planned for steps that came to nothing."""
        for cuts in steps:
            self.commit(cuts, {})

    def release_restored(self) -> None:
        """Let go of what rows were restored from: the step has it."""
        for block in self.restoring:
            self.pool.release(block)
        self.restoring.clear()

    def remember(self, sequence: Sequence, logits: Logits) -> None:
        """See Publishing.remember."""
        self.publishing.remember(sequence, logits)

    def finish(self, sequence: Sequence, cut: Callable[[int, int, bool], Payload], exact: bool = True) -> Block | None:
        """Keep the rest of a sequence that is about to give up its row; see Publishing.finish."""
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
