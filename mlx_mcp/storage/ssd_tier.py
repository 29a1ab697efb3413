"""Blocks on disk: several in a file (a segment), found again after a restart, checked whenever they are read.

Knows keys and bytes; what they mean is the caller's. One thread calls it; `find` may be called from any.

- A block is in the index only when it is durable, and `get` returns what `put` was given, or nothing.
- A segment is never changed. Removing one of its blocks for good writes the others to a new one first.
- Damage is a miss and a count. A file goes only when nothing sound in it can be lost: its head is provably not ours, or
  all of its blocks are removed, found damaged, or there anew.
- Blocks that an earlier version wrote in another form are a miss, a count, and removed.
- Quota takes whole segments, the least recently used first, never a block that a durable session needs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from mlx_mcp.core.ports import StoredBlock, TierEntry
from mlx_mcp.errors import StorageError
from mlx_mcp.storage.daily_budget import DailyBudget
from mlx_mcp.storage.folder import Folder, Piece, storage_error
from mlx_mcp.storage.sealed import Unsound, digest, unseal
from mlx_mcp.storage.segment import KIND, OLD_SUFFIX, SUFFIX, Record, Segment, SegmentDraft, drafts, read_segment

HASH_ON_THREAD_BYTES = 1 << 16  # less is hashed sooner than another thread has woken up
HASH_THREADS = max(1, min(3, (os.cpu_count() or 1) // 2))  # SSDs outrun one; the engine needs cores too


@dataclass(frozen=True)
class TierStats:
    """What is there, and what has been, since the folder was opened."""

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
        """Find what is in the folder by reading every segment's head.

        Args:
            folder: where they are.
            quota_bytes: what all segments may take.
            daily_bytes: what offloads may write from midnight to midnight (UTC).
            is_needed: whether a durable session needs a block.
            wall: the time of day, in seconds.
        """
        self._folder, self._is_needed, self._quota_bytes = folder, is_needed, quota_bytes
        self._budget = DailyBudget(daily_bytes, wall)
        self._index: dict[bytes, tuple[Segment, Record]] = {}
        self._segments: OrderedDict[str, Segment] = OrderedDict()  # the least recently used first
        self._serial = self._nbytes = self._old = 0
        self._hits = self._misses = self._corrupt = self._dropped = self._evicted = 0
        self._hashers = ThreadPoolExecutor(HASH_THREADS, "mlx-mcp-hash")
        self._scan()

    def close(self) -> None:
        """Let go of the threads."""
        self._hashers.shutdown()

    @property
    def stats(self) -> TierStats:
        """A snapshot."""
        return TierStats(
            len(self._index),
            self._nbytes,
            self._hits,
            self._misses,
            self._corrupt,
            self._dropped,
            self._budget.written_bytes,
            self._evicted,
            self._old,
        )

    def find(self, key: bytes) -> TierEntry | None:
        """Whether a block is there; never waits, from any thread."""
        found = self._index.get(key)
        if found is None:
            return None
        record = found[1]
        return TierEntry(record.nbytes, record.window_start, record.has_state)

    def records(self, keys: Iterable[bytes]) -> list[Record]:
        """What is known of blocks without reading them, up to the first that is not there."""
        return [record for _, record in self._locate(keys)]

    def put(self, blocks: Seq[StoredBlock], *, offload: bool = False) -> int:
        """Keep blocks, durably once this returns; returns the bytes written, of blocks that were not there (as rich).

        An offload that would exceed the day's budget writes nothing, and is counted.

        Raises:
            StorageError: they cannot be written now; what was there before still is.
        """
        new = self._new(blocks)
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
        """Blocks in this order, up to the first that is not there or not sound."""
        keys = list(keys)
        blocks: list[StoredBlock] = []
        for segment, records in groupby(self._locate(keys), itemgetter(0)):
            wished = [record for _, record in records]
            read, error = self._read(segment, wished)
            blocks += read
            if len(read) < len(wished):
                self._forget(segment, wished[len(read)], damaged=error is None)
                break
            self._segments.move_to_end(segment.name)
        self._hits += len(blocks)
        self._misses += len(blocks) < len(keys)
        return blocks

    def delete(self, keys: Iterable[bytes]) -> None:
        """Remove blocks and their bytes, durably once this returns, whichever files they are in.

        Raises:
            StorageError: some are there still; no other block is lost.
        """
        gone = set(keys)
        for segment in [one for one in self._segments.values() if not gone.isdisjoint(one.records)]:
            self._remove_from(segment, lambda key: key not in gone)

    def collect(self) -> None:
        """Remove segments that were written for durable sessions of which none is left.

        Raises:
            StorageError: some are there still.
        """
        self._unlink([one for one in self._segments.values() if not one.offload and not self._has_needed(one)])

    def clear(self) -> None:
        """Forget all, and remove the bytes.

        Raises:
            StorageError: some are there still.
        """
        self._unlink(list(self._segments.values()))
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
            self._add(segment)
        if unsound:
            self._folder.unlink(unsound)
        self._unlink([segment for segment in self._segments.values() if not self._live(segment)])

    def _add(self, segment: Segment) -> None:
        """Index a file's blocks, unless there are richer ones. Of equals the later wins: the other may be damaged."""
        self._segments[segment.name] = segment
        self._nbytes += segment.nbytes
        for key, record in segment.records.items():
            known = self._index.get(key)
            whole = record.offset + record.nbytes <= segment.nbytes
            if whole and (known is None or record.rank >= known[1].rank):
                self._index[key] = segment, record

    def _live(self, segment: Segment) -> list[Record]:
        """The blocks for which this is the file."""
        return [record for key, record in segment.records.items() if self._is_live(segment, key)]

    def _is_live(self, segment: Segment, key: bytes) -> bool:
        known = self._index.get(key)
        return known is not None and known[0] is segment

    def _has_needed(self, segment: Segment) -> bool:
        return any(self._is_needed(record.key) for record in self._live(segment))

    def _new(self, blocks: Seq[StoredBlock]) -> list[StoredBlock]:
        """The blocks that are not there as rich, each once."""
        best: dict[bytes, StoredBlock] = {}
        for block in blocks:
            rank = block.has_state, -block.window_start
            known = self._index.get(block.key)
            other = best.get(block.key)
            if (known is None or rank > known[1].rank) and (
                other is None or rank > (other.has_state, -other.window_start)
            ):
                best[block.key] = block
        return list(best.values())

    # -- reading

    def _locate(self, keys: Iterable[bytes]) -> Iterator[tuple[Segment, Record]]:
        for key in keys:
            found = self._index.get(key)
            if found is None:
                return
            yield found

    def _hash(self, data: Seq[memoryview | bytes]) -> Future[bytes]:
        if sum(len(part) for part in data) < HASH_ON_THREAD_BYTES:
            done: Future[bytes] = Future()
            done.set_result(digest(data))
            return done
        return self._hashers.submit(digest, data)

    def _read(self, segment: Segment, records: Seq[Record]) -> tuple[list[StoredBlock], OSError | None]:
        """Blocks of one file, up to the first that is damaged or could not be read, and the error if it was that."""
        read: list[tuple[bytes, Future[bytes]]] = []
        error = None
        try:
            with self._folder.reading(segment.name) as file:
                for record in records:  # each is hashed while the next is read
                    data = file.read(record.nbytes, record.offset)
                    read.append((data, self._hash((data,))))
        except OSError as exc:
            error = exc
        blocks: list[StoredBlock] = []
        for record, (data, hashed) in zip(records, read, strict=False):
            if hashed.result() != record.digest:
                return blocks, None
            blocks.append(record.restored(data))
        return blocks, error

    def _forget(self, segment: Segment, record: Record, damaged: bool) -> None:
        """Take a block for gone. Its file goes too if nothing in it is left, and damage is why.

        What could not be read now may be readable after a restart.
        """
        self._corrupt += 1
        del self._index[record.key]
        if damaged and not self._live(segment):
            with contextlib.suppress(StorageError):  # nothing that a reader could do; the quota will come for it
                self._unlink([segment])

    # -- writing and removing

    def _drafts(self, blocks: Seq[StoredBlock], offload: bool) -> list[SegmentDraft]:
        files = drafts(blocks, self._serial + 1, offload)
        self._serial += len(files)
        return files

    def _write(self, files: Seq[SegmentDraft]) -> None:
        """Make files, each of which is in the index once it is durable."""
        hashes = [[self._hash(block.data) for block in draft.blocks] for draft in files]
        for draft, of_blocks in zip(files, hashes, strict=True):  # they go on while files are written and synced
            self._write_one(draft, of_blocks)

    def _write_one(self, draft: SegmentDraft, hashes: Seq[Future[bytes]]) -> None:
        """Make a file, index it, and let go of those that it leaves without a block."""
        name = secrets.token_hex(16) + SUFFIX

        def pieces() -> Iterator[Piece]:
            offset = draft.header.nbytes
            for block in draft.blocks:
                yield offset, block.data
                offset += block.nbytes
            yield 0, (draft.header.seal(self._folder.key, [hashed.result() for hashed in hashes]),)

        try:
            self._folder.write(name, pieces())
        except StorageError:
            with contextlib.suppress(StorageError):  # the folder's sync may have failed after the renaming
                self._folder.unlink([name])
            raise
        before = {self._index[block.key][0] for block in draft.blocks if block.key in self._index}
        self._add(draft.written(name, [hashed.result() for hashed in hashes]))
        self._budget.count(draft.nbytes)
        with contextlib.suppress(StorageError):  # the quota will come for them
            self._unlink([segment for segment in before if not self._live(segment)])

    def _make_room(self, need: int, incoming: set[bytes]) -> None:
        """Evict until so many more bytes fit.

        Raises:
            StorageError: durable sessions need too much of the quota.
        """
        if self._nbytes + need <= self._quota_bytes:
            return

        def is_needed(key: bytes) -> bool:
            return key in incoming or self._is_needed(key)

        def full(needed_bytes: int) -> StorageError:
            return StorageError(
                f"{need / 1e6:.1f} MB do not fit: durable sessions take {needed_bytes / 1e6:.1f} MB of the "
                f"{self._quota_bytes / 1e6:.1f} MB allowed on disk. Close sessions that are no longer needed, or have "
                "the server started with a larger limit."
            )

        needed_bytes = sum(record.nbytes for _, record in self._index.values() if is_needed(record.key))
        if needed_bytes + need > self._quota_bytes:
            raise full(needed_bytes)
        # Whole files first, for they cost nothing; then those that durable sessions share with others.
        for shared in (False, True):
            for segment in list(self._segments.values()):
                if self._nbytes + need <= self._quota_bytes:
                    return
                live = self._live(segment)
                num_needed = sum(is_needed(record.key) for record in live)
                if num_needed == 0 or (shared and num_needed < len(segment.records)):
                    self._remove_from(segment, is_needed)
                    self._evicted += len(live) - num_needed
        if self._nbytes + need > self._quota_bytes:
            raise full(self._nbytes)

    def _remove_from(self, segment: Segment, is_needed: Callable[[bytes], bool]) -> None:
        """Leave nothing of a file but what is needed, in a new one."""
        needed = [record for record in self._live(segment) if is_needed(record.key)]
        while needed:
            blocks, error = self._read(segment, needed)
            if error is not None:
                raise storage_error(error, "Reading a file of the cache folder") from error
            if len(blocks) == len(needed):
                self._write(self._drafts(blocks, segment.offload))
                break
            self._forget(segment, needed.pop(len(blocks)), damaged=False)
        self._unlink([segment])

    def _unlink(self, segments: Seq[Segment]) -> None:
        """Forget segments with all that is live in them, and remove their files."""
        for segment in segments:
            for record in self._live(segment):
                del self._index[record.key]
        if segments:
            self._folder.unlink([segment.name for segment in segments])
        for segment in segments:
            if self._segments.pop(segment.name, None):
                self._nbytes -= segment.nbytes
