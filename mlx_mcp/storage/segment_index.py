"""Which segment a block is in, and in which order segments were used. Opens no files.

Several segments may have a block of one key. The richest of these is live, and of equals the latest: the other may be
damaged. All others are dead, and go with their segments.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq

from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.storage.segment import Record, Segment


class SegmentIndex:
    """The segments of a folder, and the live blocks in them. One thread changes it; any may call `find`."""

    def __init__(self) -> None:
        self.segments: OrderedDict[str, Segment] = OrderedDict()  # by name, the least recently used first
        self.live: dict[bytes, tuple[Segment, Record]] = {}  # by the block's key
        self.nbytes = 0  # of all segments

    def find(self, key: bytes) -> tuple[Segment, Record] | None:
        """The live block of a key, and its segment; None if there is none."""
        return self.live.get(key)

    def locate(self, keys: Iterable[bytes]) -> Iterator[tuple[Segment, Record]]:
        """The live blocks of these keys in this order, up to the first that is not there."""
        for key in keys:
            found = self.live.get(key)
            if found is None:
                return
            yield found

    def live_in(self, segment: Segment) -> list[Record]:
        """The live blocks of a segment."""
        return [record for key, record in segment.records.items() if self._is_live(segment, key)]

    def missing(self, blocks: Seq[StoredBlock]) -> list[StoredBlock]:
        """The blocks that are not there, or not as rich; of several of one key the richest."""
        best: dict[bytes, StoredBlock] = {}
        for block in blocks:
            rank = block.has_state, -block.window_start
            known = self.live.get(block.key)
            other = best.get(block.key)
            if (known is None or rank > known[1].rank) and (
                other is None or rank > (other.has_state, -other.window_start)
            ):
                best[block.key] = block
        return list(best.values())

    def add(self, segment: Segment) -> None:
        """Take in a segment, as the most recently used; blocks that its file is too short for are never live."""
        self.segments[segment.name] = segment
        self.nbytes += segment.nbytes
        for key, record in segment.records.items():
            known = self.live.get(key)
            whole = record.offset + record.nbytes <= segment.nbytes
            if whole and (known is None or record.rank >= known[1].rank):
                self.live[key] = segment, record

    def use(self, segment: Segment) -> None:
        """Make a segment the most recently used."""
        self.segments.move_to_end(segment.name)

    def forget_block(self, key: bytes) -> None:
        """Have no live block of a key any more."""
        del self.live[key]

    def forget_blocks(self, segment: Segment) -> None:
        """Have no live block in a segment any more. Its bytes count until it is removed."""
        for record in self.live_in(segment):
            del self.live[record.key]

    def remove(self, segment: Segment) -> None:
        """Take out a segment whose file is gone; nothing for one that was taken out before."""
        if self.segments.pop(segment.name, None):
            self.nbytes -= segment.nbytes

    def _is_live(self, segment: Segment, key: bytes) -> bool:
        known = self.live.get(key)
        return known is not None and known[0] is segment
