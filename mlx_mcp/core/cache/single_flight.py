"""Has one sequence compute the blocks that several need, while the others wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from mlx_mcp.core.cache.blocks import BlockHash
from mlx_mcp.core.cache.prefixes import PrefixCache
from mlx_mcp.core.cache.tracks import Track
from mlx_mcp.core.sequence import Sequence


class SingleFlight:
    """Which sequences need which blocks of prompts, which sequence computes them, and which wait for it."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        # Block hash → the number of sequences whose prompts begin with it.
        self.users: Counter[BlockHash] = Counter()
        # Block hash → the running sequence that computes it.
        self.builders: dict[BlockHash, Sequence] = {}
        # Sequence → the one for which it last waited, and how many tokens that one has to compute for it.
        self.leaders: dict[Sequence, tuple[Sequence, int]] = {}

    def enter(self, track: Track) -> None:
        """Add a sequence that waits."""
        self.users.update(track.prompt_hashes)

    def exit(self, track: Track) -> None:
        """Forget a sequence that neither waits nor runs any more."""
        self.leaders.pop(track.sequence, None)
        self.users.subtract(track.prompt_hashes)
        for digest in track.prompt_hashes:
            if not self.users[digest]:
                del self.users[digest]

    def start(self, track: Track, num_blocks: int) -> None:
        """Note that a sequence computes its prompt's blocks after the first `num_blocks`, except those under way."""
        for digest in track.hashes[num_blocks : track.num_prompt_blocks]:
            self.builders.setdefault(digest, track.sequence)

    def stop(self, track: Track) -> None:
        """Note that a sequence computes nothing any longer."""
        for digest in track.prompt_hashes:
            if self.builders.get(digest) is track.sequence:
                del self.builders[digest]

    def is_waiting(self, sequence: Sequence) -> bool:
        """Whether the sequence for which this one last waited still computes what it needs."""
        leader, until = self.leaders.get(sequence, (None, 0))
        return leader is not None and leader.slot is not None and leader.num_computed < until

    def wait(self, track: Track) -> bool:
        """Have a sequence wait if a running one is about to compute what it needs next; returns whether it waits."""
        sequence, size = track.sequence, self.cache.block_tokens
        if self.is_waiting(sequence):
            return True
        self.leaders.pop(sequence, None)
        prompt = track.hashes[: (len(sequence.prompt_ids) - 1) // size]
        at = len(self.cache.walk(track.root, sequence.prompt_ids, prompt)) - 1
        leader = self.builders.get(prompt[at]) if at < len(prompt) else None
        if leader is None or leader.num_computed >= (at + 1) * size:
            return False
        while at < len(prompt) and self.builders.get(prompt[at]) is leader:
            at += 1
        self.leaders[sequence] = leader, at * size
        return True

    def check_integrity(self, tracks: Collection[Track], running: Collection[Sequence]) -> None:
        """Prove that users are counted right, that running sequences build blocks, and that existing sequences wait."""
        users: Counter[BlockHash] = Counter()
        for track in tracks:
            users.update(track.prompt_hashes)
        assert users == self.users, "users are miscounted"
        assert set(self.builders.values()) <= set(running), "a block is built by nobody"
        assert set(self.leaders) <= {track.sequence for track in tracks}, "a sequence that is gone waits for another"
