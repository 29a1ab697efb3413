"""Reads and writes the files of blocks in a folder; hashes on threads meanwhile. Knows no index and no quota."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor

from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.errors import StorageError
from mlx_mcp.storage.folder import Folder, Piece
from mlx_mcp.storage.sealed import digest
from mlx_mcp.storage.segment import SUFFIX, Record, Segment, SegmentDraft

HASH_ON_THREAD_BYTES = 1 << 16  # less is hashed sooner than another thread has woken up
HASH_THREADS = max(1, min(3, (os.cpu_count() or 1) // 2))  # SSDs outrun one; the engine needs cores too


class SegmentFiles:
    """The segments of a folder as files. One thread calls it."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._hashers = ThreadPoolExecutor(HASH_THREADS, "mlx-mcp-hash")

    def close(self) -> None:
        """End the threads."""
        self._hashers.shutdown()

    def read(self, segment: Segment, records: Seq[Record]) -> tuple[list[StoredBlock], OSError | None]:
        """Read blocks of one segment, up to the first that is damaged or cannot be read.

        Returns the blocks, and the error if the next one cannot be read.
        """
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
            blocks.append(record.to_block(data))
        return blocks, error

    def write(self, drafts: Seq[SegmentDraft]) -> Iterator[Segment]:
        """Write segments one after another; yields each once it is durable.

        Raises:
            StorageError: one cannot be written now, and is not there.
        """
        hashes = [[self._hash(block.data) for block in draft.blocks] for draft in drafts]
        for draft, of_blocks in zip(drafts, hashes, strict=True):  # they go on while files are written and synced
            yield self._write_one(draft, of_blocks)

    def _write_one(self, draft: SegmentDraft, hashes: Seq[Future[bytes]]) -> Segment:
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
        return draft.to_segment(name, [hashed.result() for hashed in hashes])

    def _hash(self, data: Seq[memoryview | bytes]) -> Future[bytes]:
        if sum(len(part) for part in data) < HASH_ON_THREAD_BYTES:
            done: Future[bytes] = Future()
            done.set_result(digest(data))
            return done
        return self._hashers.submit(digest, data)
