"""Decides what waiting sequences get from a tier, and puts it into the trees of blocks. Reads nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from mlx_mcp.core.cache.blocks import Block
from mlx_mcp.core.cache.prefixes import PrefixCache, block_key
from mlx_mcp.core.cache.tracks import Track
from mlx_mcp.core.layout import Layout, Payload
from mlx_mcp.core.ports import StoredBlock, TierEntry
from mlx_mcp.core.sequence import Sequence


@dataclass(frozen=True)
class Wanted:
    """A block that a tier has: tokens [start, end) of a sequence."""

    key: bytes
    start: int
    end: int
    entry: TierEntry


class TierReads:
    """Which sequences wait for blocks from a tier, and which tokens came from there."""

    def __init__(self, cache: PrefixCache, layout: Layout) -> None:
        self.cache, self.layout = cache, layout
        self.fetching: set[Sequence] = set()  # those whose blocks are being read
        self.fetched: dict[Sequence, tuple[int, int]] = {}  # tokens [from, to) that came from there
        self.computing: set[Sequence] = set()  # those that compute what a tier has, because that is faster

    def exit(self, sequence: Sequence) -> None:
        """Forget a sequence that neither waits nor runs any more."""
        self.fetching.discard(sequence)
        self.computing.discard(sequence)
        self.fetched.pop(sequence, None)

    def wanted(self, track: Track, find: Callable[[bytes], TierEntry | None]) -> list[Wanted]:
        """The blocks of a waiting sequence that a tier has and memory lacks, in order, from which rows can continue.

        These are whole blocks of its tokens, and the tail with which its session ended.
        """
        sequence, size = track.sequence, self.cache.block_tokens
        limit, tokens = sequence.num_tokens - 1, sequence.tokens(0, sequence.num_tokens)
        hashes = self.cache.hashes(track.root, tokens, track.hashes)
        block = self.cache.walk(track.root, tokens, hashes[: limit // size])[-1]
        found: list[Wanted] = []
        key, start = block.key, block.end
        while start < limit and not (found and found[-1].end - found[-1].start < size):
            ends = [end for end in (start + size, sequence.num_kept) if start < end <= min(limit, start + size)]
            keys = ((block_key(key, tokens[start:end]), end) for end in ends)
            there = next(((k, end, entry) for k, end in keys if (entry := find(k)) is not None), None)
            if there is None:
                break
            key, end, entry = there
            found.append(Wanted(key, start, end, entry))
            start = end
        while found and self.layout.states and not found[-1].entry.has_state:
            found.pop()
        # Memory may have more of it, in a tail.
        return found if found and found[-1].end > track.match(self.cache, self.layout).num_tokens else []

    def add_restored(
        self, sequence: Sequence, root: Block, blocks: list[tuple[StoredBlock, Payload]]
    ) -> tuple[int, int]:
        """Put blocks of a sequence's tokens into the trees as far as there is room; returns the range of tokens added.

        A block with other tokens, or of another place, is left out, and so are all that come after it.
        """
        pool = self.cache.pool
        start = end = blocks[0][0].start if blocks else 0
        before = sequence.tokens(0, start)
        block = self.cache.walk(root, before, self.cache.hashes(root, before, []))[-1]
        for stored, payload in blocks:
            same = (stored.start, stored.parent) == (block.end, block.key)
            if not same or stored.tokens != sequence.tokens(end, end + len(stored.tokens)):
                break
            pool.acquire(block)
            fits = pool.ledger.charge(payload.nbytes)
            pool.release(block)
            if not fits:
                break
            block = self.cache.put(block, stored.tokens, payload, payload.nbytes, sequence.ephemeral)
            if block.end != end + len(stored.tokens):
                break
            end = block.end
        return start, end

    def finish(self, sequence: Sequence, tokens: tuple[int, int]) -> None:
        """Have a sequence wait no longer, since tokens [from, to) have come."""
        self.fetching.discard(sequence)
        self.fetched[sequence] = tokens

    def num_restored(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of a sequence's first `num_tokens` tokens were read from a tier for it."""
        start, end = self.fetched.get(sequence, (0, 0))
        return max(0, min(end, num_tokens) - start)

    def check_integrity(self, tracks: Collection[Track]) -> None:
        """Prove that all sequences here exist."""
        known = {*self.fetching, *self.computing, *self.fetched}
        assert known <= {track.sequence for track in tracks}, "a sequence that is gone waits for a tier"
