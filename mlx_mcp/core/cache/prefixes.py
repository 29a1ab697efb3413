"""Finds the longest prefix whose keys and values are cached. Knows the trees of blocks, and no sequences."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import blake2b

from mlx_mcp.core.cache.blocks import Block, BlockHash, BlockPool
from mlx_mcp.core.layout import Layout, Logits, Part, Payload


@dataclass(frozen=True)
class Match:
    """Where the first `num_tokens` tokens of a prompt are cached. Of the last block perhaps only a part is used."""

    blocks: tuple[Block, ...]
    num_tokens: int
    num_whole: int  # tokens in whole blocks that are there, whether rows can continue from them or not
    logits: Logits | None = None  # the logits after the last token, if the prompt has no other tokens

    @property
    def parts(self) -> tuple[Part, ...]:
        """The payloads from which a row is restored."""
        return tuple(Part(b.payload, min(b.end, self.num_tokens) - b.start) for b in self.blocks if b.payload)


def identity_of(fingerprint: bytes, block_tokens: int, chunk_tokens: int, tenant: str) -> bytes:
    """What tells the prefixes of a model and tenant from others. Prompts in other chunks are rounded otherwise."""
    return fingerprint + f"\0{block_tokens} {chunk_tokens}\0".encode() + tenant.encode()


def block_key(parent: bytes, tokens: Seq[int]) -> bytes:
    """The name of a block outside of memory, where its parents cannot be compared: 32 bytes."""
    return blake2b(parent + array("I", tokens).tobytes(), digest_size=32).digest()


@dataclass(frozen=True)
class PrefixCache:
    """The trees of blocks as a table of prefixes.

    A block's hash includes its parent's, up to a root that stands for one model and tenant. On a hit the token ids are
    compared as well, so that hashes that collide never give another prefix's keys and values.
    """

    pool: BlockPool
    hash_bytes: int = 32

    @property
    def block_tokens(self) -> int:
        """The number of tokens of a whole block."""
        return self.pool.block_tokens

    def hash(self, parent: BlockHash, tokens: Seq[int]) -> BlockHash:
        """The hash of a block."""
        return BlockHash(blake2b(parent + array("I", tokens).tobytes(), digest_size=self.hash_bytes).digest())

    def hashes(self, root: Block, tokens: Seq[int], known: list[BlockHash]) -> list[BlockHash]:
        """The hashes of the whole blocks of `tokens`. Extends `known`, which are the hashes of the first ones."""
        for start in range(len(known) * self.block_tokens, len(tokens) - self.block_tokens + 1, self.block_tokens):
            known.append(self.hash(known[-1] if known else root.hash, tokens[start : start + self.block_tokens]))
        return known

    def child(self, parent: Block, digest: BlockHash, tokens: Seq[int]) -> Block | None:
        """The block of these tokens after `parent`, if it is there."""
        child = parent.children.get(digest)
        return child if child is not None and child.tokens == tuple(tokens) else None

    def put(self, parent: Block, tokens: tuple[int, ...], payload: Payload, charged: int, private: bool) -> Block:
        """Put a payload after `parent`, unless it is there already; returns its block, or `parent` if it cannot be.

        `charged` bytes are on the ledger for it; those that are not needed are refunded. `private` says whether an
        ephemeral session has computed it.
        """
        assert payload.nbytes <= charged, f"a payload of {payload.nbytes} bytes, {charged} charged"
        self.pool.ledger.refund(charged - payload.nbytes)
        digest = self.hash(parent.hash, tokens)
        there = self.child(parent, digest, tokens)
        if there is None:
            if not parent.resident or digest in parent.children:
                self.pool.ledger.refund(payload.nbytes)
                return parent
            block = self.pool.add(parent, digest, tokens, payload, block_key(parent.key, tokens))
            block.private = private
            return block
        there.private &= private
        if richer(payload, there):
            self.pool.replace(there, payload)
        else:
            self.pool.ledger.refund(payload.nbytes)
        return there

    def walk(self, root: Block, tokens: Seq[int], hashes: list[BlockHash]) -> list[Block]:
        """The root and the whole blocks of `tokens` after it, as far as they are there."""
        chain = [root]
        for digest in hashes:
            start = chain[-1].end
            child = self.child(chain[-1], digest, tokens[start : start + self.block_tokens])
            if child is None:
                break
            chain.append(child)
        return chain

    def match(self, root: Block, tokens: Seq[int], hashes: list[BlockHash], layout: Layout) -> Match:
        """Find the longest prefix from which a row of this layout can continue.

        One token at least is left to compute, unless the logits after all of them are cached.
        """
        chain = self.walk(root, tokens, hashes)
        num_whole = chain[-1].end

        def usable_tokens(chain: list[Block], end: int) -> int:
            ended = chain[-1].prompt_end
            if end == len(tokens) and (ended is None or ended.num_tokens != end):
                end -= 1
            return end if usable(chain, end, layout) else 0

        while True:
            node = chain[-1]
            rest = tuple(tokens[node.end : node.end + self.block_tokens])
            used, best = usable_tokens(chain, node.end), node
            for child in node.children.values():
                more = max(used - node.end, 0) + 1  # what it needs in common to be better; there may be thousands
                if child.tokens[:more] != rest[:more]:
                    continue
                end = node.end + common(child.tokens, rest)
                if used < end and used < (end := usable_tokens([*chain, child], end)):
                    used, best = end, child
            if used or node.parent is None:
                blocks = chain[1:] if best is node else [*chain[1:], best]
                ended = best.prompt_end if used == len(tokens) else None
                return Match(tuple(blocks), used, num_whole, None if ended is None else ended.logits)
            chain.pop()


def usable(chain: list[Block], end: int, layout: Layout) -> bool:
    """Whether a row can continue from the first `end` tokens, the last of which is in the chain's last block."""
    last = chain[-1]
    if last.payload is None:
        return False
    if layout.states and not (end == last.end and last.payload.has_state):
        return False
    needed = end - max(layout.windows, default=0)
    for block in reversed(chain[1:]):
        if block.end <= needed:
            break
        assert block.payload is not None, "an evicted block in a tree"
        if block.payload.window_start > max(block.start, needed):
            return False
    return True


def richer(payload: Payload, block: Block) -> bool:
    """Whether a payload has something that a block of the same tokens lacks."""
    old = block.payload
    assert old is not None, "an evicted block in a tree"
    return (payload.has_state and not old.has_state) or (
        payload.window_start < old.window_start and payload.has_state >= old.has_state
    )


def common(one: Seq[int], other: Seq[int]) -> int:
    """The number of tokens with which two token lists begin alike."""
    if one[:1] != other[:1]:
        return 0
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
