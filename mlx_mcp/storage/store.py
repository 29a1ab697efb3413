"""One cache folder: its lock, its blocks, its sessions, and the order in which they are written and removed.

Blocks are durable before the session that needs them, and a session is removed before its blocks. So whatever a kill
leaves is either whole or needed by no session, and `open` removes what no session needs.

One thread at a time calls it; only `tier.find` may be called from any.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

from mlx_mcp.core.durable import SessionHead, SessionRecord, Transfer, check_name
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.errors import StorageError
from mlx_mcp.storage import export
from mlx_mcp.storage.folder import Calls, Folder, write_durably
from mlx_mcp.storage.sealed import Unsound
from mlx_mcp.storage.session_log import SessionLog
from mlx_mcp.storage.ssd_tier import SsdTier


class Store:
    """A folder that this process owns."""

    def __init__(self, folder: Folder, quota_bytes: int, daily_bytes: int, wall: Callable[[], float]) -> None:
        self._folder = folder
        self._protected: frozenset[bytes] = frozenset()  # blocks that a session that is being written or exported needs
        self.sessions = SessionLog(folder)
        self.tier = SsdTier(folder, quota_bytes, daily_bytes, self._is_needed, wall)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        quota_bytes: int,
        daily_bytes: int,
        wall: Callable[[], float] = time.time,
        calls: Calls | None = None,
    ) -> Store:
        """Open a cache folder, which is made if it is missing, and find what is in it.

        Args:
            path: the folder, which nobody but this user may enter.
            quota_bytes: how many bytes all blocks may take on disk.
            daily_bytes: how many bytes offloads may write a day.
            wall: returns the time since 1970 in seconds.
            calls: the system calls.

        Raises:
            FolderInUse: another process has the folder open.
            StorageError: the folder cannot be used, or is not safe to use.
        """
        folder = Folder.open(path, calls or Calls())
        try:
            store = cls(folder, quota_bytes, daily_bytes, wall)
            with contextlib.suppress(StorageError):  # a full disk: the next start will try again
                store._finish_removals()
                # A session whose file could not be read may come back, and then wants its blocks.
                if not store.sessions.num_damaged:
                    store.tier.collect()
        except BaseException:
            folder.close()
            raise
        return store

    def close(self) -> None:
        """Release the folder, so that another process can open it."""
        self.tier.close()
        self._folder.close()

    def persist(self, blocks: Seq[StoredBlock], record: SessionRecord) -> int:
        """Make a session durable, with those of its blocks that are not on disk; returns the bytes of blocks written.

        When this returns, the session survives kills and power cuts. Until then, the same version of it as it was
        before does.

        Raises:
            StorageError: it cannot be stored now, or needs blocks that are neither given nor on disk.
        """
        with self._protecting(record.blocks):
            # The tail has a file of its own: the next turn replaces it, and nothing else has to be written anew.
            tail = record.blocks[-1:]
            written = self.tier.put([block for block in blocks if block.key not in tail])
            written += self.tier.put([block for block in blocks if block.key in tail])
            num_missing = sum(self.tier.find(key) is None for key in record.blocks)
            if num_missing:
                raise StorageError(
                    f"{num_missing} of the session's {len(record.blocks)} blocks are not on disk. Persist it again."
                )
            self.sessions.save(record)
        with contextlib.suppress(StorageError):  # the session is durable; what it was before goes the next time
            self._finish_removals()
        return written

    def remove(self, session_id: str, version: str | None = None) -> int:
        """Remove a session, or one version, and the blocks that no other needs; returns how many versions were removed.

        Raises:
            StorageError: some bytes may still be there; `open` completes what was begun.
        """
        removed = self.sessions.remove(session_id, version)
        self._finish_removals()
        return removed

    def expire(self, now: float) -> list[SessionHead]:
        """Remove the sessions whose TTL is over, and return their heads. `SessionLog` says how `now` counts.

        Raises:
            StorageError: as for `remove`.
        """
        expired = self.sessions.expired(now)
        for head in expired:
            self.remove(head.session_id, head.version)
        return expired

    def purge(self) -> None:
        """Remove all sessions and all blocks, damaged ones too.

        Raises:
            StorageError: some are still there.
        """
        self.sessions.clear()
        self.tier.clear()

    def export(self, session_id: str, version: str, transfer: Transfer) -> int:
        """Write a session and its blocks on disk to a file, which other folders can import; returns its size in bytes.

        Other calls may come between the parts. Only `purge` removes blocks that are still to be written.

        Raises:
            StorageError: there is no such session, or the file cannot be written.
        """
        record = self.sessions.load(session_id, version)
        if record is None:
            raise StorageError(f"No durable session {session_id[:80]!r} to export. Persist it first.")
        records = self.tier.records(record.blocks)
        num_kept = min(record.num_kept, sum(len(known.tokens) for known in records))
        record = replace(record, blocks=record.blocks[: len(records)], num_kept=num_kept)
        transfer.total_bytes = sum(known.nbytes for known in records)

        def blocks() -> Iterator[StoredBlock]:
            for batch in export.batched(records):
                keys = [known.key for known in batch]
                got = self.tier.get(keys)
                if [known.digest for known in self.tier.records(keys)] != [known.digest for known in batch]:
                    raise StorageError("A block of the session is damaged, or was changed meanwhile. Export it again.")
                yield from got
                transfer.advance(sum(block.nbytes for block in got))

        pieces = export.pieces(record, records, [known.digest for known in records], blocks())
        try:
            with self._protecting(record.blocks):
                return write_durably(self._folder.calls, transfer.fd, transfer.file_name, pieces)
        except OSError as exc:
            raise StorageError(
                f"Writing {transfer.file_name} failed: {exc.strerror}. Make room, or choose another place for it."
            ) from exc
        finally:
            with contextlib.suppress(StorageError):  # what was held back; else the next start does it
                self._finish_removals()

    def verify_export(self, transfer: Transfer) -> SessionRecord:
        """Read an exported file from beginning to end, and return the session in it.

        Raises:
            StorageError: the file is not whole, or cannot be read.
        """
        with export.reading(self._folder.calls, transfer) as exported:
            for blocks in exported.batches():
                transfer.advance(sum(block.nbytes for block in blocks))
        transfer.done_bytes = 0
        return exported.record

    def import_(self, transfer: Transfer, name: str = "") -> SessionHead:
        """Make durable what another folder exported, in place of a session of the same handle and version.

        Digests prove that the file is whole, and not who made it: import only what you trust.

        Args:
            transfer: the file.
            name: the session's new name; if it is empty, the session keeps its name.

        Raises:
            InvalidRequest: another session has the name.
            StorageError: the file is damaged or cannot be read, or its session cannot be stored now.
        """
        keys: list[bytes] = []
        with export.reading(self._folder.calls, transfer) as exported:
            record = replace(exported.record, name=name or exported.record.name)
            check_import(record, self.sessions.heads())
            try:
                with self._protecting(record.blocks):
                    for blocks in exported.batches():
                        keys += [block.key for block in blocks]
                        self.tier.put(blocks)
                        transfer.advance(sum(block.nbytes for block in blocks))
                    self.persist((), record)
            except (Unsound, StorageError):
                self.tier.delete([key for key in keys if not self._is_needed(key)])
                raise
        return next(head for head in self.sessions.heads() if _is_of(head, record))

    def _is_needed(self, key: bytes) -> bool:
        return key in self._protected or self.sessions.is_referenced(key)

    @contextlib.contextmanager
    def _protecting(self, keys: Seq[bytes]) -> Iterator[None]:
        """Keep these blocks from being evicted and removed within the `with` block."""
        before, self._protected = self._protected, self._protected | frozenset(keys)
        try:
            yield
        finally:
            self._protected = before

    def _finish_removals(self) -> None:
        unneeded = self.sessions.unneeded_blocks()
        self.tier.delete([key for key in unneeded if key not in self._protected])
        if self._protected.isdisjoint(unneeded):  # else whoever holds them comes here afterwards
            self.sessions.forget_unneeded()


def check_import(record: SessionRecord, heads: Seq[SessionHead]) -> None:
    """Check that an imported session takes neither the name nor the handle of another one.

    Raises:
        InvalidRequest: another session has its name.
        StorageError: another tenant has a session of its handle.
    """
    for head in heads:
        if head.session_id == record.session_id and head.tenant != record.tenant:
            raise StorageError("Another tenant has a session of that handle. Remove it first.")
        if record.name and (head.tenant, head.name) == (record.tenant, record.name):
            check_name(record, head.session_id)


def _is_of(head: SessionHead, record: SessionRecord) -> bool:
    return (head.session_id, head.version) == (record.session_id, record.version)
