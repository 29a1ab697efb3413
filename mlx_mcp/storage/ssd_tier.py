"""Blocks on disk: several in a file (a segment), found again after a restart, checked whenever they are read.

Knows keys and bytes, and not what they mean. One thread calls it; `find` may be called from any.

- A block is in the index only when it is durable, and `get` returns what `put` was given, or nothing.
- A segment is never changed. Removing one of its blocks for good writes the others to a new one first.
- A damaged block is a miss, and is counted. A file is removed only when no sound block can be lost by that: its header
  is not ours, or all of its blocks are removed, damaged, or in another file too.
- Blocks that an earlier version wrote in another form are counted and removed.
- The quota evicts whole segments, the least recently used first, and never a block that a durable session needs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from mlx_mcp.core.ports import StoredBlock, TierEntry
from mlx_mcp.errors import StorageError
from mlx_mcp.storage.daily_budget import DailyBudget
from mlx_mcp.storage.folder import Folder, storage_error
from mlx_mcp.storage.sealed import Unsound, unseal
from mlx_mcp.storage.segment import KIND, OLD_SUFFIX, SUFFIX, Record, Segment, SegmentDraft, drafts, read_segment
from mlx_mcp.storage.segment_files import SegmentFiles
from mlx_mcp.storage.segment_index import SegmentIndex


@dataclass(frozen=True)
class TierStats:
    """What is on disk, and what happened since the folder was opened."""

    blocks: int
    bytes: int
    hits: int
    misses: int
    corrupt: int  # files and blocks that were not what had been written, or could not be read
    dropped: int  # blocks that the daily budget refused
    written_bytes: int  # today
    evicted: int  # blocks
    old: int  # files of an earlier version, which were removed


class SsdTier:
    """A `BlockTier` in a folder."""

    def __init__(
        self,
        folder: Folder,
        quota_bytes: int,
        daily_bytes: int,
        is_needed: Callable[[bytes], bool] = lambda key: False,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Find the blocks in the folder by reading every segment's header.

        Args:
            folder: where the segments are.
            quota_bytes: how many bytes all segments may take.
            daily_bytes: how many bytes offloads may write from midnight to midnight (UTC).
            is_needed: whether a durable session needs a block.
            wall: returns the time since 1970 in seconds.
        """
        self._folder, self._is_needed, self._quota_bytes = folder, is_needed, quota_bytes
        self._budget = DailyBudget(daily_bytes, wall)
        self._index, self._files = SegmentIndex(), SegmentFiles(folder)
        self._serial = self._old = 0
        self._hits = self._misses = self._corrupt = self._dropped = self._evicted = 0
        self._scan()

    def close(self) -> None:
        """End the threads."""
        self._files.close()

    @property
    def stats(self) -> TierStats:
        """A snapshot of the counts."""
        return TierStats(
            len(self._index.live),
            self._index.nbytes,
            self._hits,
            self._misses,
            self._corrupt,
            self._dropped,
            self._budget.written_bytes,
            self._evicted,
            self._old,
        )

    @property
    def nbytes(self) -> int:
        """See OffloadTier.nbytes."""
        return self._index.nbytes

    @property
    def num_evicted(self) -> int:
        """See OffloadTier.num_evicted."""
        return self._evicted

    def find(self, key: bytes) -> TierEntry | None:
        """See BlockTier.find."""
        found = self._index.find(key)
        if found is None:
            return None
        record = found[1]
        return TierEntry(record.nbytes, record.window_start, record.has_state)

    def records(self, keys: Iterable[bytes]) -> list[Record]:
        """The records of blocks, without reading these, up to the first block that is not there."""
        return [record for _, record in self._index.locate(keys)]

    def put(self, blocks: Seq[StoredBlock], *, offload: bool = False) -> int:
        """Store blocks durably; returns the bytes written, of blocks that were not there, or not as rich.

        An offload that would exceed the day's budget writes nothing, and is counted.

        Raises:
            StorageError: they cannot be written now; what was there before is still there.
        """
        new = self._index.missing(blocks)
        if not new:
            return 0
        files = self._drafts(new, offload)
        need = sum(draft.nbytes for draft in files)
        if offload and not self._budget.allows(need):
            self._dropped += len(new)
            return 0
        self._make_room(need, {block.key for block in blocks})
        self._write(files)
        if offload:
            self._budget.count_offload(need)
        return need

    def get(self, keys: Iterable[bytes]) -> list[StoredBlock]:
        """Read blocks in this order, up to the first that is not there or is damaged."""
        keys = list(keys)
        blocks: list[StoredBlock] = []
        for segment, records in groupby(self._index.locate(keys), itemgetter(0)):
            wanted = [record for _, record in records]
            read, error = self._files.read(segment, wanted)
            blocks += read
            if len(read) < len(wanted):
                self._forget(segment, wanted[len(read)], damaged=error is None)
                break
            self._index.use(segment)
        self._hits += len(blocks)
        self._misses += len(blocks) < len(keys)
        return blocks

    def delete(self, keys: Iterable[bytes]) -> None:
        """Remove blocks and their bytes durably, whichever files they are in.

        Raises:
            StorageError: some are still there; no other block is lost.
        """
        gone = set(keys)
        for segment in [one for one in self._index.segments.values() if not gone.isdisjoint(one.records)]:
            self._remove_from(segment, lambda key: key not in gone)

    def collect(self) -> None:
        """Remove segments that were written for sessions, if no session needs a block of them any more.

        Raises:
            StorageError: some are still there.
        """
        self._unlink([one for one in self._index.segments.values() if not one.offload and not self._has_needed(one)])

    def clear(self) -> None:
        """Remove all blocks.

        Raises:
            StorageError: some are still there.
        """
        self._unlink(list(self._index.segments.values()))
        self._folder.unlink([name for name in self._folder.names() if name.endswith((SUFFIX, OLD_SUFFIX))])

    # -- what is there

    def _scan(self) -> None:
        names = self._folder.names()
        old = [name for name in names if name.endswith(OLD_SUFFIX)]
        self._old = len(old)
        unsound, found = old, []
        for name in names:
            if not name.endswith(SUFFIX):
                continue
            try:
                with self._folder.reading(name) as file:
                    head = unseal(KIND, self._folder.key, file)
                    found.append(read_segment(name, head, file.nbytes))
                    self._budget.count_earlier(file.nbytes, found[-1].offload, file.modified_at)
            except Unsound:
                self._corrupt += 1
                unsound.append(name)
            except OSError:  # no file, or it cannot be read now: leave it alone
                self._corrupt += 1
        for segment in sorted(found, key=lambda segment: (segment.serial, segment.name)):
            self._serial = max(self._serial, segment.serial)
            self._index.add(segment)
        if unsound:
            self._folder.unlink(unsound)
        self._unlink([segment for segment in self._index.segments.values() if not self._index.live_in(segment)])

    def _has_needed(self, segment: Segment) -> bool:
        return any(self._is_needed(record.key) for record in self._index.live_in(segment))

    # -- reading

    def _forget(self, segment: Segment, record: Record, damaged: bool) -> None:
        """Forget a block that is damaged or cannot be read, and remove a damaged file of which no block is live.

        What could not be read now may be readable after a restart.
        """
        self._corrupt += 1
        self._index.forget_block(record.key)
        if damaged and not self._index.live_in(segment):
            with contextlib.suppress(StorageError):  # nothing that a reader could do; the quota will come for it
                self._unlink([segment])

    # -- writing and removing

    def _drafts(self, blocks: Seq[StoredBlock], offload: bool) -> list[SegmentDraft]:
        files = drafts(blocks, self._serial + 1, offload)
        self._serial += len(files)
        return files

    def _write(self, files: Seq[SegmentDraft]) -> None:
        """Write segments, index each once it is durable, and remove those that it leaves without a live block."""
        for segment in self._files.write(files):
            found = (self._index.find(key) for key in segment.records)
            before = {known[0] for known in found if known is not None}
            self._index.add(segment)
            self._budget.count(segment.nbytes)
            with contextlib.suppress(StorageError):  # the quota will come for them
                self._unlink([segment for segment in before if not self._index.live_in(segment)])

    def _make_room(self, need: int, incoming: set[bytes]) -> None:
        """Evict segments until so many more bytes fit.

        Raises:
            StorageError: durable sessions need too much of the quota.
        """
        if self._index.nbytes + need <= self._quota_bytes:
            return

        def is_needed(key: bytes) -> bool:
            return key in incoming or self._is_needed(key)

        def full(needed_bytes: int) -> StorageError:
            return StorageError(
                f"{need / 1e6:.1f} MB do not fit: durable sessions take {needed_bytes / 1e6:.1f} MB of the "
                f"{self._quota_bytes / 1e6:.1f} MB allowed on disk. Close sessions that are no longer needed, or have "
                "the server started with a larger limit."
            )

        needed_bytes = sum(record.nbytes for _, record in self._index.live.values() if is_needed(record.key))
        if needed_bytes + need > self._quota_bytes:
            raise full(needed_bytes)
        # First files without needed blocks, which costs nothing; then those that have some needed blocks.
        for shared in (False, True):
            for segment in list(self._index.segments.values()):
                if self._index.nbytes + need <= self._quota_bytes:
                    return
                live = self._index.live_in(segment)
                num_needed = sum(is_needed(record.key) for record in live)
                if num_needed == 0 or (shared and num_needed < len(segment.records)):
                    self._remove_from(segment, is_needed)
                    self._evicted += len(live) - num_needed
        if self._index.nbytes + need > self._quota_bytes:
            raise full(self._index.nbytes)

    def _remove_from(self, segment: Segment, is_needed: Callable[[bytes], bool]) -> None:
        """Remove a file, after the blocks in it that are needed were written to a new one."""
        needed = [record for record in self._index.live_in(segment) if is_needed(record.key)]
        while needed:
            blocks, error = self._files.read(segment, needed)
            if error is not None:
                raise storage_error(error, "Reading a file of the cache folder") from error
            if len(blocks) == len(needed):
                self._write(self._drafts(blocks, segment.offload))
                break
            self._forget(segment, needed.pop(len(blocks)), damaged=False)
        self._unlink([segment])

    def _unlink(self, segments: Seq[Segment]) -> None:
        """Forget segments with all their live blocks, and remove their files."""
        for segment in segments:
            self._index.forget_blocks(segment)
        if segments:
            self._folder.unlink([segment.name for segment in segments])
        for segment in segments:
            self._index.remove(segment)
