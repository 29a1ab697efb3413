"""All blocks: what they cost, who refers to them, and which is evicted first when memory runs out.

Blocks form trees. A block holds a fixed number of tokens, and its parent the tokens before them. A block that is only
partly filled is a tail, and has no children. Knows no models and no arrays.

    root ── [0, 64) ─┬─ [64, 128) ── [128, 192) ── tail [192, 201)
                     └─ [64, 128)'── tail [128, 130)
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NewType

from mlx_mcp.core.layout import Payload, PromptEnd
from mlx_mcp.core.slots import Ledger

BlockHash = NewType("BlockHash", bytes)


@dataclass(eq=False)
class Block:
    """Keys and values of some tokens, which depend on all tokens before them. Never changed once it is made."""

    hash: BlockHash  # of its tokens and of its parent's hash
    parent: Block | None  # None for a root, which stands for no tokens at all
    tokens: tuple[int, ...]
    start: int  # the position of its first token
    payload: Payload | None = None  # None for a root, and once it is evicted
    key: bytes = b""  # its name outside of memory: a hash too, but never a short one
    children: dict[BlockHash, Block] = field(default_factory=dict)  # each counts as a reference
    ref_count: int = 0  # pins, restores and cuts under way, of this block or of any after it
    num_sessions: int = 0  # sessions whose last block it is
    last_used: int = 0  # by the pool's clock; when a child is dropped, its use counts as a use of this block
    num_hits: int = 0  # how often it was found again, or a session ended with it; a dropped child's count too
    prompt_end: PromptEnd | None = None  # of the latest prompt that ended in it
    private: bool = False  # only ephemeral sessions have computed or found it: never leaves memory

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.tokens)

    @property
    def resident(self) -> bool:
        """Whether it can be matched, and blocks can follow it."""
        return self.payload is not None or self.parent is None

    @property
    def nbytes(self) -> int:
        """The bytes that it is charged with."""
        end = 0 if self.prompt_end is None else self.prompt_end.logits.nbytes
        return 0 if self.payload is None else self.payload.nbytes + end

    def chain(self) -> Iterator[Block]:
        """It and all blocks before it, the last one first, without the root."""
        block = self
        while block.parent is not None:
            yield block
            block = block.parent


class BlockPool:
    """The blocks of all models, each charged to the ledger; when that is full, the least recently used are evicted."""

    def __init__(self, ledger: Ledger, block_tokens: int) -> None:
        self.ledger, self.block_tokens = ledger, block_tokens
        ledger.reclaim = self.reclaim
        self.roots: dict[bytes, Block] = {}
        self.used_bytes = 0
        self.protected_bytes = 0  # of blocks with references: these cannot be reclaimed
        self.num_blocks = 0
        self.num_evictions = 0
        self.max_blocks: int | None = None  # where a device can only have so many arrays
        # Called while the block is still there, to decide at once whether it goes to a tier. A list of evicted blocks
        # for later would hold memory that the ledger counts as free.
        self.on_evict: Callable[[Block], None] | None = None
        self._clock = 0
        # (last use, order of entry, block): the leaves without references, and outdated entries, which are skipped.
        self._leaves: list[tuple[int, int, Block]] = []
        self._entries = itertools.count()

    def root(self, identity: bytes, digest: BlockHash, key: bytes = b"") -> Block:
        """The root of the tree of one model and tenant. Roots share nothing, whatever their hashes."""
        if identity not in self.roots:
            self.roots[identity] = Block(digest, None, (), 0, key=key)
        return self.roots[identity]

    def add(
        self, parent: Block, digest: BlockHash, tokens: tuple[int, ...], payload: Payload, key: bytes = b""
    ) -> Block:
        """Add a block after `parent`. Its bytes are on the ledger already."""
        assert parent.resident, "a block on one that is gone"
        assert digest not in parent.children, "a block that is there already"
        block = Block(digest, parent, tokens, parent.end, payload, key=key)
        parent.children[digest] = block
        self.used_bytes += block.nbytes
        self.num_blocks += 1
        self.touch(block)
        return block

    def replace(self, block: Block, payload: Payload) -> None:
        """Replace a block's payload by a richer one, whose bytes are on the ledger already; refund the old bytes."""
        old, block.payload = block.nbytes, payload
        self._resized(block, old, payload.nbytes)

    def end_prompt(self, block: Block, end: PromptEnd) -> None:
        """Keep the logits of a prompt that ended in a block, in place of others. Their bytes are on the ledger."""
        old, block.prompt_end = block.nbytes, end
        self._resized(block, old, end.logits.nbytes)

    def touch(self, block: Block) -> None:
        """Note a use of a block and of all before it. This is O(1), since no block is evicted before those after it."""
        self._clock += 1
        block.last_used = self._clock
        self._offer(block)

    def acquire(self, block: Block) -> None:
        """Keep a block and all before it from being evicted."""
        assert block.resident, "a reference to a block that is gone"
        for each in block.chain():
            if not each.ref_count:
                self.protected_bytes += each.nbytes
            each.ref_count += 1

    def release(self, block: Block) -> None:
        """Give back one `acquire`."""
        for each in block.chain():
            assert each.ref_count > 0, f"a block at {each.start} released too often"
            each.ref_count -= 1
            if not each.ref_count:
                self.protected_bytes -= each.nbytes
        self._offer(block)

    def add_session(self, block: Block) -> None:
        """Note that one more session ends with a block. The block may be evicted all the same."""
        block.num_sessions += 1

    def remove_session(self, block: Block, whole: bool = False) -> None:
        """Note that one session less ends with a block. Drop a tail without sessions: newer blocks have its tokens.

        With `whole` set, blocks before it are dropped too, up to the first that something else refers to.
        """
        assert block.num_sessions > 0, "a session removed too often"
        block.num_sessions -= 1
        each, tail = block, len(block.tokens) < self.block_tokens
        while (whole or tail) and each.parent is not None and each.payload is not None:
            if each.children or each.ref_count or each.num_sessions:
                break
            parent, tail = each.parent, False
            self.drop(each)
            each = parent

    def drop(self, block: Block) -> None:
        """Drop a leaf that nothing refers to."""
        assert block.parent is not None, "a root stays"
        assert not block.children, "a block with others after it"
        assert not block.ref_count, "a block that is in use"
        self.ledger.refund(block.nbytes)
        self.used_bytes -= block.nbytes
        self.num_blocks -= 1
        block.payload = block.prompt_end = None
        parent = block.parent
        del parent.children[block.hash]
        parent.last_used = max(parent.last_used, block.last_used)
        parent.num_hits = max(parent.num_hits, block.num_hits)
        self._offer(parent)

    def reclaim(self, num_bytes: int) -> bool:
        """Evict blocks until so many bytes are free; evicts nothing and returns False if that is not possible."""
        if num_bytes > self.used_bytes - self.protected_bytes:
            return False
        goal = self.used_bytes - num_bytes
        while self.used_bytes > goal:
            self._evict()
        return True

    def trim(self) -> None:
        """Evict blocks until there are no more than `max_blocks`, or all others are in use."""
        while self.max_blocks is not None and self.num_blocks > self.max_blocks:
            if self.used_bytes == self.protected_bytes:
                return
            self._evict()

    def clear(self, root: Block) -> None:
        """Drop every block of a root that nothing refers to."""
        blocks = sorted(walk(root), key=lambda b: -b.start)
        for block in blocks:
            if not block.children and not block.ref_count:
                self.drop(block)

    def eviction_order(self) -> list[Block]:
        """The blocks that could be evicted now, in the order in which they would be."""
        last_used, children = {}, {}
        for root in self.roots.values():
            for block in walk(root):
                last_used[block], children[block] = block.last_used, len(block.children)
        order: list[Block] = []
        while ready := [b for b in last_used if not children[b] and not b.ref_count]:
            block = min(ready, key=lambda b: last_used[b])
            order.append(block)
            assert block.parent is not None
            if block.parent in last_used:
                children[block.parent] -= 1
                last_used[block.parent] = max(last_used[block.parent], last_used[block])
            del last_used[block]
        return order

    def check_integrity(self, references: Iterable[Block] = ()) -> None:
        """Prove that trees, references and bytes agree.

        `references` are the blocks that were acquired, each as often as it was. There must be no other references.
        """
        acquired = Counter(references)
        assert all(block.resident for block in acquired), "a reference to a block that is gone"
        blocks = [block for root in self.roots.values() for block in walk(root)]
        assert len(blocks) == self.num_blocks, f"{len(blocks)} blocks in the trees, {self.num_blocks} counted"
        assert sum(b.nbytes for b in blocks) == self.used_bytes, "the blocks' bytes do not add up"
        assert sum(b.nbytes for b in blocks if b.ref_count) == self.protected_bytes, "protected bytes do not add up"
        assert self.used_bytes <= self.ledger.used_bytes <= self.ledger.limit_bytes, "the ledger is wrong"
        offered = {entry[2] for entry in self._leaves if entry[0] == entry[2].last_used}
        for block in blocks:
            parent = block.parent
            assert parent is not None, "a root among the blocks"
            assert block.payload is not None, "an evicted block in a tree"
            assert parent.children[block.hash] is block, "a child under another's hash"
            assert parent.resident, "a parent that is gone"
            assert parent.end == block.start, "a gap between blocks"
            held = acquired[block] + sum(child.ref_count for child in block.children.values())
            assert block.ref_count == held, f"{block.ref_count} references to a block at {block.start}, {held} held"
            assert block.children or block.ref_count or block in offered, "a leaf that would never be evicted"

    def _evict(self) -> None:
        block = self._next()
        if self.on_evict is not None:
            self.on_evict(block)
        self.drop(block)
        self.num_evictions += 1

    def _resized(self, block: Block, old_bytes: int, charged: int) -> None:
        """Count a block's new size. The ledger has `charged` bytes for what is new, in addition to the old size."""
        growth = block.nbytes - old_bytes
        self.used_bytes += growth
        if block.ref_count:
            self.protected_bytes += growth
        self.ledger.refund(charged - growth)

    def _offer(self, block: Block) -> None:
        if block.parent is not None and block.payload is not None and not block.children and not block.ref_count:
            heapq.heappush(self._leaves, (block.last_used, next(self._entries), block))
            if len(self._leaves) > 64 + 4 * self.num_blocks:  # mostly outdated ones
                current = {id(e[2]): e for e in self._leaves if e[0] == e[2].last_used and e[2].payload is not None}
                self._leaves = sorted(current.values())

    def _next(self) -> Block:
        """The least recently used leaf."""
        while True:
            last_used, _, block = heapq.heappop(self._leaves)
            there = block.payload is not None and not block.children and not block.ref_count
            if there and last_used == block.last_used:
                return block


def walk(root: Block) -> Iterator[Block]:
    """Every block after a root."""
    stack = list(root.children.values())
    while stack:
        block = stack.pop()
        yield block
        stack += block.children.values()
