"""A tier in memory, for folders that cannot be used, and for tests. Its blocks end with the process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

from mlx_mcp.core.ports import StoredBlock, TierEntry
from mlx_mcp.errors import StorageError


class MemoryTier:
    """A `BlockTier` of limited size, which drops the least recently used blocks."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._blocks: OrderedDict[bytes, StoredBlock] = OrderedDict()
        self._nbytes = 0

    def find(self, key: bytes) -> TierEntry | None:
        """See BlockTier.find."""
        block = self._blocks.get(key)
        return None if block is None else TierEntry(block.nbytes, block.window_start, block.has_state)

    def put(self, blocks: Seq[StoredBlock]) -> int:
        """Keep copies of blocks; returns the bytes copied, of blocks that were not there, or not as rich.

        Raises:
            StorageError: the blocks together take more than the limit.
        """
        total = sum(block.nbytes for block in blocks)
        if total > self._limit_bytes:
            raise StorageError(f"{total} bytes of blocks exceed the {self._limit_bytes} allowed. Raise the limit.")
        written = 0
        for block in blocks:
            known = self._blocks.get(block.key)
            if known is None or (block.has_state, -block.window_start) > (known.has_state, -known.window_start):
                self.delete([block.key])
                self._blocks[block.key] = replace(block, data=(memoryview(b"".join(block.data)),))
                self._nbytes += block.nbytes
                written += block.nbytes
        while self._nbytes > self._limit_bytes:
            self.delete([next(iter(self._blocks))])
        return written

    def get(self, keys: Iterable[bytes]) -> list[StoredBlock]:
        """See BlockTier.get."""
        blocks = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            self._blocks.move_to_end(key)
            blocks.append(block)
        return blocks

    def delete(self, keys: Iterable[bytes]) -> None:
        """Drop blocks."""
        for key in keys:
            block = self._blocks.pop(key, None)
            if block is not None:
                self._nbytes -= block.nbytes
