"""The file to which a session is exported, with its blocks. Its digests are sealed with no folder's key.

Digests prove that a file is whole, and not who made it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from mlx_mcp.core.durable import SessionRecord, Transfer
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.errors import StorageError
from mlx_mcp.storage import session_log
from mlx_mcp.storage.folder import Calls, OpenFile, Piece, opened
from mlx_mcp.storage.sealed import Unsound, digest, draft, unseal
from mlx_mcp.storage.segment import MAX_SEGMENT_BLOCKS, Record, describe, records_of, tensors_of

KIND = "mlx-mcp export 1"


@dataclass(frozen=True)
class Exported:
    """An exported session in a file that is open."""

    record: SessionRecord
    blocks: list[Record]
    file: OpenFile

    def batches(self) -> Iterator[list[StoredBlock]]:
        """Read the blocks, a few at a time, and check them.

        Raises:
            Unsound: a block is not what was written.
            OSError: a block cannot be read.
        """
        for batch in batched(self.blocks):
            blocks = [known.to_block(self.file.read(known.nbytes, known.offset)) for known in batch]
            if any(digest(block.data) != known.digest for block, known in zip(blocks, batch, strict=True)):
                raise Unsound("changed since it was written")
            yield blocks


def batched(records: list[Record]) -> Iterator[list[Record]]:
    """Split blocks into groups that fit in memory."""
    for first in range(0, len(records), MAX_SEGMENT_BLOCKS):
        yield records[first : first + MAX_SEGMENT_BLOCKS]


def pieces(
    record: SessionRecord, known: Seq[StoredBlock | Record], digests: Seq[bytes], blocks: Iterable[StoredBlock]
) -> Iterator[Piece]:
    """The pieces of a session's file. `blocks` are the `known` ones with their bytes, and may be lazy.

    The session's tokens and text come last: text may have any length, so that nothing after it would be aligned.

    Raises:
        StorageError: the session is larger than any may be.
    """
    described, payload = session_log.describe(record)
    tensors = [*tensors_of(known), *session_log.tensors_of(described)]
    header = draft(KIND, {"session": described} | describe(known), len(known) + 1, tensors)
    yield 0, (header.seal(b"", [*digests, digest((payload,))]),)
    offset = header.nbytes
    for block in blocks:
        yield offset, block.data
        offset += block.nbytes
    yield offset, (payload,)


@contextlib.contextmanager
def reading(calls: Calls, transfer: Transfer) -> Iterator[Exported]:
    """Open the session in an exported file.

    Raises:
        StorageError: the file is not whole, or cannot be read; also if that is found within the `with` block.
    """
    try:
        file = opened(calls, transfer.fd)
        head = unseal(KIND, b"", file)
        said = head.record.get("session")
        if not isinstance(said, dict):
            raise Unsound("no session")
        blocks = records_of(head.record, head.digests[:-1], head.nbytes)
        end = head.nbytes + sum(known.nbytes for known in blocks)
        record = session_log.read_record(said, file, end, head.digests[-1:])
        if end + session_log.payload_bytes(said) != file.nbytes:
            raise Unsound("longer than it was written")
        if record.blocks != tuple(known.key for known in blocks):
            raise Unsound("other blocks than the session's")
        transfer.total_bytes = sum(known.nbytes for known in blocks)
        yield Exported(record, blocks, file)
    except Unsound as exc:
        raise StorageError(
            f"{transfer.file_name} is not a whole export of a session ({exc}). Export it again."
        ) from exc
    except OSError as exc:
        raise StorageError(f"Reading {transfer.file_name} failed: {exc.strerror}. Export it again.") from exc
