"""Durable sandboxes: one file each, with what is known of it in the header, its dump and its journal behind that.

Knows nothing of what dump and journal say. The files have a folder of their own, so that they are read and written
while the I/O thread of the engine is busy with the other. One thread calls it.

- `save` replaces a sandbox's file as a whole: after any end of the process the file is the old one or the new one.
- The files take `quota_bytes` at most. What nobody asked to keep goes first, the least recently used before others.
- A damaged file is set aside (*.bad, the newest 16) and counted. To ask for what was in it is an error that says so.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mlx_mcp.core.durable_sandbox import SandboxFacts, SandboxHead, SandboxRecord, damaged
from mlx_mcp.core.layout import Tensor
from mlx_mcp.errors import StorageError
from mlx_mcp.storage.folder import BAD, Calls, Folder, OpenFile, ReadOnlyFolder, set_aside
from mlx_mcp.storage.idle_clock import IdleClock
from mlx_mcp.storage.sealed import Unsound, digest, draft, encode, unseal

KIND = "mlx-mcp sandbox 1"
SUFFIX = ".sandbox.safetensors"
MAX_STATE_BYTES = 1 << 30  # of a dump, and of a journal

FACTS = get_type_hints(SandboxFacts)  # the fields that a header has unchanged, and their types


@dataclass(frozen=True)
class _Entry:
    """One sandbox or version in the log."""

    head: SandboxHead
    file_name: str
    saved_at: float  # by our own clock
    used_at: float  # by our own clock


class SandboxLog:
    """The durable sandboxes of a folder."""

    def __init__(self, folder: Folder, quota_bytes: int) -> None:
        """Find the sandboxes by reading the header of every file."""
        self._folder, self._quota_bytes = folder, quota_bytes
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._bad: set[str] = set()  # names of files that were damaged and set aside
        self.num_damaged = 0
        for name in folder.names():
            if name.endswith(SUFFIX):
                self._read_again(name)
            elif name.endswith(SUFFIX + BAD):
                self._bad.add(name.removesuffix(BAD))
        self._clock = IdleClock(entry.saved_at for entry in self._entries.values())

    @classmethod
    def open(cls, path: Path, *, quota_bytes: int, calls: Calls | None = None) -> SandboxLog:
        """Open a folder, which is made if it is missing, and find what is in it.

        Raises:
            FolderInUse: another process has the folder open.
            StorageError: the folder cannot be used, or is not safe to use.
        """
        folder = Folder.open(path, calls or Calls())
        try:
            return cls(folder, quota_bytes)
        except BaseException:
            folder.close()
            raise

    @classmethod
    def look(cls, path: Path) -> SandboxLog:
        """Read a folder as it is now, which another process may have open. Nothing can be changed.

        Raises:
            StorageError: there is no such folder, or it cannot be read.
        """
        return cls(ReadOnlyFolder.open(path, Calls()), 0)

    def close(self) -> None:
        """Close the folder, so that another process can open it."""
        self._folder.close()

    def heads(self) -> list[SandboxHead]:
        """The heads of all sandboxes and versions."""
        return [entry.head for entry in self._entries.values()]

    def save(self, record: SandboxRecord) -> None:
        """Make a sandbox durable, in place of the same version of it.

        Raises:
            StorageError: it cannot be written now, or there is no room for it. The version is what it was before.
        """
        longest = max(len(record.dump), len(record.journal))
        if longest > MAX_STATE_BYTES:
            raise StorageError(
                f"The sandbox's state has {longest / 1e6:.1f} MB, and {MAX_STATE_BYTES / 1e6:.1f} MB can be kept. Set "
                "large variables that can be made again to None."
            )
        at, name = (record.sandbox_id, record.version), self._file_name(record)
        old = self._entries.get(at)
        assert old is None or old.file_name == name, "a sandbox changed hands"
        described = {fact: getattr(record, fact) for fact in FACTS}
        described["lengths"] = [len(record.dump), len(record.journal)]
        described["clock"] = {
            "saved": self._clock.look_at(record.saved_at),
            "idle_s": max(0.0, record.saved_at - record.used_at),
        }
        header = draft(KIND, described, 2, _tensors_of(described["lengths"]))
        entry = _entry_of(described, name, header.nbytes + len(record.dump) + len(record.journal))
        self._make_room(entry)
        sealed = header.seal(self._folder.key, [digest((record.dump,)), digest((record.journal,))])
        try:
            self._folder.write(name, [(0, (sealed, record.dump, record.journal))])
        except StorageError:
            self._entries.pop(at, None)
            self._read_again(name)
            raise
        self._entries[at] = entry

    def load(self, sandbox_id: str, version: str = "") -> SandboxRecord | None:
        """Read a sandbox; returns None if it is not there. A damaged one is set aside.

        Raises:
            StorageError: it is damaged, or cannot be read.
        """
        entry = self._entries.get((sandbox_id, version))
        if entry is None:
            return None
        try:
            with self._folder.reading(entry.file_name) as file:
                head = unseal(KIND, self._folder.key, file)
                return _read_record(head.record, file, head.nbytes, head.digests)
        except Unsound as exc:
            del self._entries[sandbox_id, version]
            self._set_aside(entry.file_name)
            raise damaged(sandbox_id) from exc
        except OSError as exc:
            raise StorageError(
                f"What was kept of sandbox {sandbox_id[:80]!r} cannot be read: {exc.strerror or exc}. Check the disk, "
                "and call again."
            ) from exc

    def is_damaged(self, tenant: str, sandbox_id: str) -> bool:
        """Whether a file of that sandbox was found damaged and set aside. A name does not tell it, only a handle.

        Reads no file. Any thread may call it.
        """
        return (sandbox_id, "") not in self._entries and self._name_of(tenant, sandbox_id, "") in self._bad

    def remove(self, sandbox_id: str, version: str | None = None) -> int:
        """Remove a sandbox, or one version of it, durably; returns how many versions were removed.

        Raises:
            StorageError: some are still there, or may be after a power cut. Call again.
        """
        found = [at for at in self._entries if at[0] == sandbox_id and version in (None, at[1])]
        self._remove(found)
        return len(found)

    def clear(self) -> None:
        """Remove all sandboxes, damaged ones too.

        Raises:
            StorageError: some are still there.
        """
        self._entries.clear()
        self._bad.clear()
        self._folder.unlink([name for name in self._folder.names() if name.endswith((SUFFIX, BAD))])

    def expire(self, now: float) -> list[SandboxHead]:
        """Remove what was not used for longer than its TTL, by the wall clock, and return its heads.

        Raises:
            StorageError: some of it is still there.
        """
        now = self._clock.look_at(now)
        ended = {at: each.head for at, each in self._entries.items() if now - each.used_at > each.head.ttl_s}
        self._remove(list(ended))
        return list(ended.values())

    # -- inside

    def _make_room(self, new: _Entry) -> None:
        """Remove sandboxes that nobody asked to keep, until there is room for one more.

        Raises:
            StorageError: there is no room even so.
        """
        at = new.head.sandbox_id, new.head.version
        others = [entry for key, entry in self._entries.items() if key != at]
        over = sum(entry.head.stored_bytes for entry in others) + new.head.stored_bytes - self._quota_bytes
        going = []
        for entry in sorted(others, key=lambda entry: entry.used_at):
            if over <= 0:
                break
            if not entry.head.persisted:
                going.append((entry.head.sandbox_id, entry.head.version))
                over -= entry.head.stored_bytes
        if over > 0:
            raise StorageError(
                f"The sandbox takes {new.head.stored_bytes / 1e6:.1f} MB, and {over / 1e6:.1f} MB are missing of the "
                f"{self._quota_bytes / 1e6:.1f} MB that sandboxes may take on disk. Remove some (`mlx-mcp sandbox rm`, "
                "close_session), or have the server started with a larger max_sandbox_disk_bytes."
            )
        self._remove(going)

    def _remove(self, found: Seq[tuple[str, str]]) -> None:
        if found:
            self._folder.unlink([self._entries[at].file_name for at in found])
            for at in found:
                del self._entries[at]

    def _file_name(self, record: SandboxFacts) -> str:
        return self._name_of(record.tenant, record.sandbox_id, record.version)

    def _name_of(self, tenant: str, sandbox_id: str, version: str) -> str:
        said = encode({"tenant": tenant, "sandbox_id": sandbox_id, "version": version})
        return hmac.digest(self._folder.key, b"name" + said, "sha256").hex()[:40] + SUFFIX

    def _read_again(self, name: str) -> None:
        """Read a file's header again."""
        try:
            with self._folder.reading(name) as file:
                head = unseal(KIND, self._folder.key, file)
                entry = _entry_of(head.record, name, file.nbytes)
                if head.nbytes + sum(head.record["lengths"]) != file.nbytes:
                    raise Unsound("cut short")
            if self._file_name(entry.head) != name:
                raise Unsound("renamed")
            self._entries[entry.head.sandbox_id, entry.head.version] = entry
        except FileNotFoundError:
            return
        except Unsound:
            self._set_aside(name)
        except OSError:  # the next start will try again
            self.num_damaged += 1

    def _set_aside(self, name: str) -> None:
        self.num_damaged += 1
        self._bad.add(name)
        set_aside(self._folder, name)


def _tensors_of(lengths: Seq[int]) -> list[Tensor]:
    """The tensors in the payload of a sandbox."""
    return [Tensor("sandbox.dump", "U8", (lengths[0],)), Tensor("sandbox.journal", "U8", (lengths[1],))]


def _entry_of(said: dict[str, Any], file_name: str, file_nbytes: int) -> _Entry:
    """Read a log entry from the header of its file.

    Raises:
        Unsound: the header is not what `SandboxLog.save` writes.
    """
    try:
        saved_at, idle_s = float(said["clock"]["saved"]), float(said["clock"]["idle_s"])
        dump, journal = said["lengths"]
        if not (0 <= dump <= MAX_STATE_BYTES and 0 <= journal <= MAX_STATE_BYTES):
            raise Unsound("longer than any sandbox")
        return _Entry(SandboxHead(**_facts_of(said), stored_bytes=file_nbytes), file_name, saved_at, saved_at - idle_s)
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise Unsound("no sandbox") from exc


def _facts_of(said: dict[str, Any]) -> dict[str, Any]:
    """The facts in a header.

    Raises:
        KeyError: one is missing.
        Unsound: one is of another type.
    """
    for name, hint in FACTS.items():
        kinds = (int, float) if hint is float else (get_origin(hint) or hint,)
        texts = said[name].items() if get_args(hint) else ()
        if type(said[name]) not in kinds or any(type(part) is not str for pair in texts for part in pair):
            raise Unsound(f"{name} is of another type")
    return {name: said[name] for name in FACTS}


def _read_record(said: dict[str, Any], file: OpenFile, offset: int, digests: Seq[bytes]) -> SandboxRecord:
    """Read a sandbox whose header is `said`, and whose payloads begin at `offset`.

    Raises:
        Unsound: the file is not what was written.
        OSError: the file cannot be read.
    """
    facts, parts = _facts_of(said), []
    for length, expected in zip(said["lengths"], digests, strict=True):
        part = file.read(length, offset)
        if len(part) < length or digest((part,)) != expected:
            raise Unsound("changed since it was written")
        parts.append(part)
        offset += length
    return SandboxRecord(**facts, dump=parts[0], journal=parts[1])
