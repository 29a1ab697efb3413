"""Gives several rows one copy of the tokens that they begin with, if enough sequences begin with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from mlx_mcp.core.cache.blocks import Block, BlockHash
from mlx_mcp.core.cache.prefixes import Match
from mlx_mcp.core.cache.tracks import Track
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import KvCost, Ledger, SharedPrefix


@dataclass(frozen=True)
class Sharing:
    """How many sequences must begin with how many tokens for rows to share one copy of these.

    `min_rows` 0 means never, and None the number that was measured for the backend.
    """

    min_rows: int | None = None
    min_tokens: int = 512


class SharedPrefixes:
    """The shared prefixes of one model's rows. Each is charged to the ledger while a row has it."""

    def __init__(self, ledger: Ledger, cost: KvCost, min_rows: int, min_tokens: int) -> None:
        self.ledger, self.cost, self.min_rows, self.min_tokens = ledger, cost, min_rows, min_tokens
        self.prefixes: dict[Block, SharedPrefix] = {}  # by their last blocks, since hashes could collide
        self.num_rows: Counter[SharedPrefix] = Counter()
        self.num_made = 0

    @property
    def booked_bytes(self) -> int:
        """The bytes on the ledger for shared prefixes: for one copy of each, and for the windows of each row."""
        return sum(
            prefix.num_tokens * self.cost.token_bytes + num_rows * self.cost.window_bytes(prefix.num_tokens)
            for prefix, num_rows in self.num_rows.items()
        )

    def join(self, track: Track, match: Match, users: Counter[BlockHash], block_tokens: int) -> None:
        """Let a sequence share the longest prefix with which enough others begin, if there is one.

        `users` counts by block hash the sequences whose prompts begin with it.
        """
        if not self.min_rows:
            return
        sequence = track.sequence
        most = min(match.num_tokens, sequence.num_tokens - 1)  # a row has at least one token of its own
        for n in range(most // block_tokens, 0, -1):
            block, tokens = match.blocks[n - 1], n * block_tokens
            prefix = self.prefixes.get(block)
            if prefix is None and (users[track.hashes[n - 1]] < self.min_rows or tokens < self.min_tokens):
                continue
            copy_bytes = tokens * self.cost.token_bytes if prefix is None else 0
            if not self.ledger.charge(copy_bytes + self.cost.window_bytes(tokens)):
                return
            if prefix is None:
                self.num_made += 1
                prefix = self.prefixes[block] = SharedPrefix(self.num_made, tokens)
            self.num_rows[prefix] += 1
            sequence.prefix = prefix
            return

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence's shared prefix from it. The copy is freed with the last row that has it."""
        prefix, sequence.prefix = sequence.prefix, None
        if prefix is None:
            return
        self.num_rows[prefix] -= 1
        self.ledger.refund(self.cost.window_bytes(prefix.num_tokens))
        if not self.num_rows[prefix]:
            del self.num_rows[prefix]
            self.prefixes = {block: other for block, other in self.prefixes.items() if other != prefix}
            self.ledger.refund(prefix.num_tokens * self.cost.token_bytes)

    def check_integrity(self, running: Collection[Sequence], waiting: Collection[Sequence]) -> None:
        """Prove that the rows of each prefix are counted right, and that no waiting sequence has one."""
        rows = Counter(s.prefix for s in running if s.prefix is not None)
        assert rows == self.num_rows, "rows of shared prefixes are miscounted"
        assert set(self.prefixes.values()) == set(rows), "a shared prefix without rows, or one that nobody finds"
        assert all(s.prefix is None for s in waiting), "a waiting sequence shares a prefix"
