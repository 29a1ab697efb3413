"""Where the tokens of waiting and running sequences are in the trees of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_mcp.core.cache.blocks import Block, BlockHash
from mlx_mcp.core.cache.prefixes import Match, PrefixCache
from mlx_mcp.core.layout import Layout
from mlx_mcp.core.sequence import Sequence


@dataclass(eq=False)
class Track:
    """Where the tokens of one waiting or running sequence are in the trees of blocks."""

    sequence: Sequence
    root: Block  # the root of its tenant and model
    hashes: list[BlockHash] = field(default_factory=list)  # of its whole blocks, as far as they were needed
    num_prompt_blocks: int = 0

    @property
    def prompt_hashes(self) -> list[BlockHash]:
        """The hashes of its prompt's whole blocks."""
        return self.hashes[: self.num_prompt_blocks]

    def match(self, cache: PrefixCache, layout: Layout) -> Match:
        """The longest prefix of its tokens from which a row can continue."""
        tokens = self.sequence.tokens(0, self.sequence.num_tokens)
        return cache.match(self.root, tokens, cache.hashes(self.root, tokens, self.hashes), layout)


def track(cache: PrefixCache, root: Block, sequence: Sequence) -> Track:
    """Make a sequence's track, with the hashes of its prompt."""
    made = Track(sequence, root)
    cache.hashes(root, sequence.prompt_ids, made.hashes)
    made.num_prompt_blocks = len(made.hashes)
    return made
