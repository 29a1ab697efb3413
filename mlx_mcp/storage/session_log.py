"""Durable sessions: one file each, which has its tenant, its model, its tokens, and the keys of the blocks it needs.

Knows only the keys of blocks, and no tokenizer. One thread calls it.

- `save` replaces a session's file as a whole: after any end of the process the file is the old one or the new one.
- Blocks that a session no longer needs are recorded until they are removed, so that a kill leaves no bytes behind. The
  file of a removed session is renamed to *.gone, and a file that replaces another lists the blocks that only that one
  needed.
- A damaged file is set aside (*.bad, the newest 16), counted, and never an error: its tokens cannot be computed again.
- Sessions that an earlier version wrote in another form are counted and left alone.
- Idle time is measured by a clock of our own (`idle_clock.py`), so that no session ends because the wall clock jumps.
"""

from __future__ import annotations

import hmac
import sys
from array import array
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from mlx_mcp.core.durable import SessionFacts, SessionHead, SessionRecord
from mlx_mcp.core.layout import Tensor
from mlx_mcp.core.origin import Origin, is_sound
from mlx_mcp.errors import StorageError
from mlx_mcp.storage.folder import BAD, Folder, OpenFile, set_aside
from mlx_mcp.storage.idle_clock import IdleClock
from mlx_mcp.storage.sealed import Unsound, digest, draft, encode, unseal

KIND = "mlx-mcp session 1"
SUFFIX, GONE = ".session.safetensors", ".gone"
OLD_SUFFIX = ".session"  # of files that an earlier version wrote in another form
MAX_TOKENS = 1 << 22
MAX_TEXT_BYTES = 1 << 26
TOKEN_BYTES = 4


@dataclass(frozen=True)
class _Entry:
    """One session or version in the log."""

    head: SessionHead
    blocks: tuple[bytes, ...]
    unneeded: tuple[bytes, ...]  # blocks that the file before this one needed, and this one does not
    file_name: str
    saved_at: float  # by our own clock
    used_at: float  # by our own clock


def _json_types(hint: Any) -> tuple[type, ...]:
    """The types that a field has in JSON."""
    if hint is bytes:
        return (str,)
    if get_origin(hint) is tuple:
        return (list,)
    if float in (hint, *get_args(hint)):
        return (int, float, *get_args(hint))
    return (hint,)


FACTS = get_type_hints(SessionFacts)  # the fields that a header has unchanged, and their types
_SAID = {name: _json_types(hint) for name, hint in FACTS.items()} | {"num_tokens": (int,), "text_bytes": (int,)}


def describe(record: SessionRecord) -> tuple[dict[str, Any], bytes]:
    """Describe a session for a header, and encode its payload: tokens and text.

    Raises:
        StorageError: the session is larger than is allowed.
    """
    text = record.text.encode("utf-8", "surrogatepass")
    if len(record.tokens) > MAX_TOKENS or len(text) > MAX_TEXT_BYTES:
        raise StorageError(
            f"The session has {len(record.tokens)} tokens and {len(text) / 1e6:.1f} MB of text; at most {MAX_TOKENS} "
            f"and {MAX_TEXT_BYTES / 1e6:.1f} MB can be kept on disk. Go on in a new session."
        )
    facts = {name: getattr(record, name) for name in FACTS} | {"tools": list(record.tools)}
    said = {name: fact.hex() if isinstance(fact, bytes) else fact for name, fact in facts.items()}
    said |= {"num_tokens": len(record.tokens), "text_bytes": len(text), "blocks": [key.hex() for key in record.blocks]}
    said["turns"] = [[origin.who, origin.at, origin.begin] for origin in record.origins]
    return said, _swapped(array("I", record.tokens)).tobytes() + text


def tensors_of(said: dict[str, Any]) -> list[Tensor]:
    """The tensors in the payload of a session."""
    return [Tensor("session.tokens", "U32", (said["num_tokens"],)), Tensor("session.text", "U8", (said["text_bytes"],))]


def head_of(said: dict[str, Any], stored_bytes: int) -> tuple[SessionHead, tuple[bytes, ...]]:
    """Read the head of a session, and the keys of its blocks, from a header.

    Raises:
        Unsound: the header is not what `describe` returns.
    """
    try:
        for name, types in _SAID.items():
            if type(said[name]) not in types:
                raise Unsound(f"{name} is of another type")
        facts: dict[str, Any] = {
            name: bytes.fromhex(said[name]) if FACTS[name] is bytes else said[name] for name in FACTS
        }
        facts["tools"] = tuple(said["tools"])
        head = SessionHead(**facts, num_tokens=said["num_tokens"], stored_bytes=stored_bytes)
    except (KeyError, TypeError, ValueError) as exc:
        raise Unsound("no session") from exc
    if not (0 <= said["num_tokens"] <= MAX_TOKENS and 0 <= said["text_bytes"] <= MAX_TEXT_BYTES):
        raise Unsound("longer than any session")
    return head, keys_of(said, "blocks")


def keys_of(said: dict[str, Any], name: str) -> tuple[bytes, ...]:
    """The keys that a header has under a name.

    Raises:
        Unsound: there are no keys.
    """
    try:
        return tuple(bytes.fromhex(key) for key in said[name])
    except (KeyError, TypeError, ValueError) as exc:
        raise Unsound("no keys") from exc


def origins_of(said: dict[str, Any]) -> tuple[Origin, ...]:
    """Where the turns of a session come from; nothing is known of those that an earlier version wrote.

    Raises:
        Unsound: no session can have such turns.
    """
    try:
        origins = tuple(Origin(who, at, begin) for who, at, begin in said.get("turns", []))
        if is_sound(origins, said["num_tokens"]):
            return origins
    except (TypeError, ValueError) as exc:
        raise Unsound("no turns") from exc
    raise Unsound("turns that no session can have")


def read_record(said: dict[str, Any], file: OpenFile, offset: int, digests: Seq[bytes]) -> SessionRecord:
    """Read a session whose header is `said`, and whose payload begins at `offset` and has the first of the digests.

    Raises:
        Unsound: the file is not what was written.
        OSError: the file cannot be read.
    """
    found, blocks = head_of(said, file.nbytes)
    payload = file.read(payload_bytes(said), offset)
    if len(payload) < payload_bytes(said) or digest((payload,)) not in digests[:1]:
        raise Unsound("changed since it was written")
    tokens = array("I")
    tokens.frombytes(payload[: TOKEN_BYTES * found.num_tokens])
    try:
        text = payload[TOKEN_BYTES * found.num_tokens :].decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as exc:
        raise Unsound("no text") from exc
    facts = {name: getattr(found, name) for name in FACTS}
    return SessionRecord(**facts, tokens=tuple(_swapped(tokens)), text=text, blocks=blocks, origins=origins_of(said))


def payload_bytes(said: dict[str, Any]) -> int:
    """The size of a session's tokens and text in bytes."""
    return TOKEN_BYTES * int(said["num_tokens"]) + int(said["text_bytes"])


def _swapped(tokens: array[int]) -> array[int]:
    """Convert tokens to little-endian order, or back."""
    assert tokens.itemsize == TOKEN_BYTES
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


class SessionLog:
    """The durable sessions of a folder."""

    def __init__(self, folder: Folder) -> None:
        """Find the sessions by reading the header of every file."""
        self._folder = folder
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._references: Counter[bytes] = Counter()
        self._gone: set[str] = set()  # files of removed sessions
        self._unneeded: set[bytes] = set()  # blocks that a session needed once, and perhaps no session needs now
        self.num_damaged = self.num_old = 0
        self._scan()
        self._clock = IdleClock(entry.saved_at for entry in self._entries.values())

    def heads(self) -> list[SessionHead]:
        """The heads of all sessions and versions."""
        return [entry.head for entry in self._entries.values()]

    def is_referenced(self, key: bytes) -> bool:
        """Whether a durable session needs this block."""
        return key in self._references

    def save(self, record: SessionRecord) -> None:
        """Make a session durable, in place of the same version of it.

        Blocks that only the replaced one needed are in `unneeded_blocks` until `forget_unneeded`.

        Raises:
            StorageError: it cannot be written now. The version is what it was before.
        """
        clock = {"saved": self._clock.look_at(record.saved_at), "idle_s": max(0.0, record.saved_at - record.used_at)}
        name = self._file_name(record.tenant, record.session_id, record.version)
        old = self._entries.get((record.session_id, record.version))
        assert old is None or old.file_name == name, "a session changed hands"
        described, payload = describe(record)
        replaced = set(old.blocks if old else ()) - set(record.blocks)
        described |= {"clock": clock, "let_go": [key.hex() for key in self._unneeded | replaced]}
        header = draft(KIND, described, 1, tensors_of(described))
        entry = _entry_of(described, name, header.nbytes + len(payload))
        sealed = header.seal(self._folder.key, [digest((payload,))])
        try:
            self._folder.write(name, [(0, (sealed, payload))])
        except StorageError:
            # Nobody knows until the next start whether the disk has the old or the new file: both keep their blocks.
            self._references.update({*record.blocks, *(old.blocks if old else ())})
            self._read_again(name)
            raise
        self._add(entry)

    def load(self, session_id: str, version: str = "") -> SessionRecord | None:
        """Read a session; returns None if it is not there, or cannot be read. A damaged one is set aside."""
        entry = self._entries.get((session_id, version))
        if entry is None:
            return None
        try:
            with self._folder.reading(entry.file_name) as file:
                head = unseal(KIND, self._folder.key, file)
                return read_record(head.record, file, head.nbytes, head.digests)
        except Unsound:
            self._drop(entry)
            self._set_aside(entry.file_name)
        except OSError:
            self.num_damaged += 1
        return None

    def remove(self, session_id: str, version: str | None = None) -> int:
        """Remove a session, or one version of it, durably; returns how many versions were removed.

        Blocks that only these needed are in `unneeded_blocks` until `forget_unneeded`.

        Raises:
            StorageError: some are still there, or may be after a power cut. Call again.
        """
        found = [self._entries[at] for at in self._entries if at[0] == session_id and version in (None, at[1])]
        for entry in found:
            gone = entry.file_name + GONE
            self._folder.rename(entry.file_name, gone)
            self._drop(entry)
            self._gone.add(gone)
            self._unneeded |= set(entry.blocks)
        return len(found)

    def unneeded_blocks(self) -> list[bytes]:
        """The keys of blocks that sessions needed once, and that no session needs now."""
        return [key for key in self._unneeded if key not in self._references]

    def forget_unneeded(self) -> None:
        """Note that the blocks in `unneeded_blocks` are removed.

        Raises:
            StorageError: they will be there again.
        """
        if self._gone:
            self._folder.unlink(self._gone)
        self._gone.clear()
        self._unneeded.clear()

    def expired(self, now: float) -> list[SessionHead]:
        """The sessions that were not used for longer than their TTL, by the wall clock. Call about once a minute."""
        now = self._clock.look_at(now)
        return [
            entry.head
            for entry in self._entries.values()
            if entry.head.ttl_s is not None and now - entry.used_at > entry.head.ttl_s
        ]

    def clear(self) -> None:
        """Remove all sessions.

        Raises:
            StorageError: some are still there.
        """
        self._entries.clear()
        self._references.clear()
        self._gone.clear()
        self._unneeded.clear()
        self.num_old = 0
        ends = SUFFIX, OLD_SUFFIX, GONE, BAD
        self._folder.unlink([name for name in self._folder.names() if name.endswith(ends)])

    # -- inside

    def _file_name(self, tenant: str, session_id: str, version: str) -> str:
        said = encode({"tenant": tenant, "session_id": session_id, "version": version})
        return hmac.digest(self._folder.key, b"name" + said, "sha256").hex()[:40] + SUFFIX

    def _scan(self) -> None:
        for name in self._folder.names():
            if name.endswith(SUFFIX):
                self._read_again(name)
            elif name.endswith(OLD_SUFFIX):
                self.num_old += 1
            elif name.endswith(OLD_SUFFIX + GONE):
                self._gone.add(name)
            elif name.endswith(SUFFIX + GONE):
                try:
                    entry = self._read(name)
                    self._unneeded |= {*entry.blocks, *entry.unneeded}
                except Unsound:
                    self.num_damaged += 1
                except OSError:  # the next start will try again
                    self.num_damaged += 1
                    continue
                self._gone.add(name)

    def _read_again(self, name: str) -> None:
        """Read a file's header again."""
        try:
            entry = self._read(name)
            if self._file_name(entry.head.tenant, entry.head.session_id, entry.head.version) != name:
                raise Unsound("renamed")
            self._add(entry)
        except FileNotFoundError:
            return
        except Unsound:
            self._set_aside(name)
        except OSError:  # the next start will try again
            self.num_damaged += 1

    def _read(self, name: str) -> _Entry:
        with self._folder.reading(name) as file:
            head = unseal(KIND, self._folder.key, file)
            entry = _entry_of(head.record, name, file.nbytes)
            if head.nbytes + payload_bytes(head.record) != file.nbytes:
                raise Unsound("cut short")
            return entry

    def _add(self, entry: _Entry) -> None:
        at = entry.head.session_id, entry.head.version
        if at in self._entries:
            self._drop(self._entries[at])
        self._entries[at] = entry
        self._unneeded |= set(entry.unneeded)
        self._references.update(set(entry.blocks))

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.head.session_id, entry.head.version]
        for key in set(entry.blocks):
            self._references[key] -= 1
            if not self._references[key]:
                del self._references[key]

    def _set_aside(self, name: str) -> None:
        self.num_damaged += 1
        set_aside(self._folder, name)


def _entry_of(said: dict[str, Any], file_name: str, file_nbytes: int) -> _Entry:
    """Read a log entry from the header of its file.

    Raises:
        Unsound: the header is not what `SessionLog.save` writes.
    """
    head, blocks = head_of(said, file_nbytes)
    try:
        saved_at, idle_s = float(said["clock"]["saved"]), float(said["clock"]["idle_s"])
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise Unsound("no times") from exc
    return _Entry(head, blocks, keys_of(said, "let_go"), file_name, saved_at, saved_at - idle_s)
