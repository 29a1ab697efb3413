"""Writes evicted blocks to the store, if they were used twice and not too many are being written."""

from __future__ import annotations

import logging
from functools import partial

from mlx_mcp.core.cache.blocks import Block, BlockPool
from mlx_mcp.core.durable import Store
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.engine.io_thread import Io
from mlx_mcp.engine.results import BlocksWritten
from mlx_mcp.errors import MlxMcpError

logger = logging.getLogger(__name__)

QUEUE_SHARE = 16  # blocks that are being written take at most this part of all memory for keys and values
MAX_QUEUE_BYTES = 64 << 20


class Offload:
    """The bounded queue of evicted blocks. Engine thread only."""

    def __init__(self, io: Io, pool: BlockPool, enabled: bool) -> None:
        self.io = io
        self.store: Store | None = None  # once it has been opened
        self.evicted: list[StoredBlock] = []
        self.queue_bytes = 0  # of blocks that are being written
        self.max_queue_bytes = min(MAX_QUEUE_BYTES, pool.ledger.limit_bytes // QUEUE_SHARE)
        # Blocks that are being written still take memory, which is therefore taken off the limit once.
        pool.ledger.limit_bytes -= self.max_queue_bytes
        pool.ledger.set_aside_bytes = self.max_queue_bytes
        self.num_offloaded = self.num_dropped = 0
        if enabled:
            pool.on_evict = self.take

    def take(self, block: Block) -> None:
        """Have a block that is about to be evicted written, if it was used again and the queue has room."""
        payload, store = block.payload, self.store
        if payload is None or store is None or not block.num_hits or block.private:
            return
        entry = store.tier.find(block.key)
        if entry is not None and (entry.has_state or not payload.has_state):
            return
        if self.queue_bytes + payload.nbytes > self.max_queue_bytes:
            self.num_dropped += 1
            return
        self.queue_bytes += payload.nbytes
        self.evicted.append(to_stored(block))

    def flush(self) -> None:
        """Begin to write the blocks that were evicted. Call it after each step."""
        store = self.store
        if not self.evicted or store is None:
            return
        blocks, self.evicted = self.evicted[::-1], []  # parents first: leaves are evicted before them
        size = sum(block.nbytes for block in blocks)
        self.io.submit(lambda: store.tier.put(blocks, offload=True), partial(BlocksWritten, len(blocks), size))

    def on_blocks_written(self, result: BlocksWritten) -> None:
        """Take the result of writing blocks."""
        self.queue_bytes -= result.num_bytes
        if isinstance(result.outcome, MlxMcpError):
            logger.warning("evicted blocks were not kept: %s", result.outcome)
        if isinstance(result.outcome, MlxMcpError) or not result.outcome:  # or the day's budget is spent
            self.num_dropped += result.num_blocks
        else:
            self.num_offloaded += result.num_blocks


def to_stored(block: Block) -> StoredBlock:
    """A block in the form of the store. Its bytes are not copied."""
    payload, parent = block.payload, block.parent
    assert payload is not None, "an evicted block has no bytes"
    assert parent is not None, "a root has no bytes"
    form, data = payload.pack()
    return StoredBlock(
        block.key, parent.key, block.start, block.tokens, payload.window_start, payload.has_state, form, data
    )
