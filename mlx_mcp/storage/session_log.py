"""Durable sessions: one file each, which says whose it is, its model, its tokens, and which blocks it needs.

Knows no blocks beyond their keys, and no tokenizer. One thread calls it.

- `save` replaces a session's file as a whole: after any end of the process it is the old one or the new one.
- Blocks that a session no longer needs are on record until they are removed, so that a kill leaves no bytes behind: the
  file of a removed session is renamed to *.gone, and a file that replaces one says which blocks only that one needed.
- A damaged file is set aside (*.bad, the newest 16), counted, and never an error: its tokens cannot be computed again.
- Sessions that an earlier version wrote in another form are counted and left alone.
- Idle time is measured by a clock of our own. It goes as the wall clock goes, but never back, and by an hour at most
  from one look to the next; the time between two processes counts too, unless it were over 30 days. So a wall clock
  that jumps by years costs no session more than an hour of its TTL.
"""

from __future__ import annotations

import hmac
import math
import sys
from array import array
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from mlx_mcp.core.durable import SessionFacts, SessionHead, SessionRecord
from mlx_mcp.core.layout import Tensor
from mlx_mcp.errors import StorageError
from mlx_mcp.storage.folder import Folder, OpenFile
from mlx_mcp.storage.sealed import Unsound, digest, draft, encode, unseal

KIND = "mlx-mcp session 1"
SUFFIX, GONE, BAD = ".session.safetensors", ".gone", ".bad"
OLD_SUFFIX = ".session"  # of what an earlier version wrote in another form
MAX_TOKENS = 1 << 22
MAX_TEXT_BYTES = 1 << 26
MAX_BAD_FILES = 16
MAX_STEP_S = 3600.0
MAX_OFF_S = 30 * 86400.0
TOKEN_BYTES = 4


@dataclass(frozen=True)
class _Entry:
    """A head, and what else must be known of its file."""

    head: SessionHead
    blocks: tuple[bytes, ...]
    let_go: tuple[bytes, ...]  # blocks that the file before this one needed
    file_name: str
    saved_at: float  # by our clock
    used_at: float  # by our clock


def _json_types(hint: Any) -> tuple[type, ...]:
    """What JSON has in place of a field's type."""
    if hint is bytes:
        return (str,)
    if get_origin(hint) is tuple:
        return (list,)
    if float in (hint, *get_args(hint)):
        return (int, float, *get_args(hint))
    return (hint,)


FACTS = get_type_hints(SessionFacts)  # the fields that a record has as they are, and their types
_SAID = {name: _json_types(hint) for name, hint in FACTS.items()} | {"num_tokens": (int,), "text_bytes": (int,)}


def describe(record: SessionRecord) -> tuple[dict[str, Any], bytes]:
    """A session as a header's record says it, and its payload: tokens and text.

    Raises:
        StorageError: it is larger than any session may be.
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
    return said, _swapped(array("I", record.tokens)).tobytes() + text


def tensors_of(said: dict[str, Any]) -> list[Tensor]:
    """What is in the payload of a session that a record says."""
    return [Tensor("session.tokens", "U32", (said["num_tokens"],)), Tensor("session.text", "U8", (said["text_bytes"],))]


def head_of(said: dict[str, Any], stored_bytes: int) -> tuple[SessionHead, tuple[bytes, ...]]:
    """The session that a record says, with the keys of the blocks.

    Raises:
        Unsound: it says nothing that `describe` would.
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
    """The keys that a record has under a name.

    Raises:
        Unsound: there are none.
    """
    try:
        return tuple(bytes.fromhex(key) for key in said[name])
    except (KeyError, TypeError, ValueError) as exc:
        raise Unsound("no keys") from exc


def read_record(said: dict[str, Any], file: OpenFile, offset: int, digests: Seq[bytes]) -> SessionRecord:
    """The session that `said` says, whose payload begins at `offset` and has the first of the digests.

    Raises:
        Unsound: it is not what was written.
        OSError: it cannot be read.
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
    return SessionRecord(**facts, tokens=tuple(_swapped(tokens)), text=text, blocks=blocks)


def payload_bytes(said: dict[str, Any]) -> int:
    """What a session's tokens and text take."""
    return TOKEN_BYTES * int(said["num_tokens"]) + int(said["text_bytes"])


def _swapped(tokens: array[int]) -> array[int]:
    """Little-endian, or back."""
    assert tokens.itemsize == TOKEN_BYTES
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


class SessionLog:
    """The durable sessions of a folder."""

    def __init__(self, folder: Folder) -> None:
        """Find the sessions by reading every file's head."""
        self._folder = folder
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._references: Counter[bytes] = Counter()
        self._gone: set[str] = set()  # files of removed sessions
        self._let_go: set[bytes] = set()  # blocks that a session needed once, and perhaps none does now
        self.num_damaged = self.num_old = 0
        self._scan()
        self._clock = max((entry.saved_at for entry in self._entries.values()), default=-math.inf)
        self._wall: float | None = None  # when we last looked at it

    def heads(self) -> list[SessionHead]:
        """All durable sessions, every version."""
        return [entry.head for entry in self._entries.values()]

    def is_referenced(self, key: bytes) -> bool:
        """Whether a durable session needs this block."""
        return key in self._references

    def save(self, record: SessionRecord) -> None:
        """Make a session durable, in place of what that version of it was.

        What only the old one needed is in `let_go`, until `forget`.

        Raises:
            StorageError: it cannot be written now; the version is what it was.
        """
        clock = {"saved": self._look_at(record.saved_at), "idle_s": max(0.0, record.saved_at - record.used_at)}
        name = self._file_name(record.tenant, record.session_id, record.version)
        old = self._entries.get((record.session_id, record.version))
        assert old is None or old.file_name == name, "a session changed hands"
        described, payload = describe(record)
        replaced = set(old.blocks if old else ()) - set(record.blocks)
        described |= {"clock": clock, "let_go": [key.hex() for key in self._let_go | replaced]}
        header = draft(KIND, described, 1, tensors_of(described))
        entry = _entry_of(described, name, header.nbytes + len(payload))
        sealed = header.seal(self._folder.key, [digest((payload,))])
        try:
            self._folder.write(name, [(0, (sealed, payload))])
        except StorageError:
            # Whether the disk has the old or the new file nobody can tell until the next start: both keep their blocks.
            self._references.update({*record.blocks, *(old.blocks if old else ())})
            self._read_again(name)
            raise
        self._add(entry)

    def load(self, session_id: str, version: str = "") -> SessionRecord | None:
        """A session, or None if there is none or it cannot be read. One that is damaged is set aside."""
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
        """End a session, or one version of it, durably once this returns; returns how many versions there were.

        What goes with it is `let_go`, until `forget`.

        Raises:
            StorageError: some are there still, or may be after a power cut; ask again.
        """
        found = [self._entries[at] for at in self._entries if at[0] == session_id and version in (None, at[1])]
        for entry in found:
            gone = entry.file_name + GONE
            self._folder.rename(entry.file_name, gone)
            self._drop(entry)
            self._gone.add(gone)
            self._let_go |= set(entry.blocks)
        return len(found)

    def let_go(self) -> list[bytes]:
        """The keys of blocks that sessions needed once, and none does now."""
        return [key for key in self._let_go if key not in self._references]

    def forget(self) -> None:
        """Put out of mind what was let go, for it is removed.

        Raises:
            StorageError: it will be let go again.
        """
        if self._gone:
            self._folder.unlink(self._gone)
        self._gone.clear()
        self._let_go.clear()

    def expired(self, now: float) -> list[SessionHead]:
        """The sessions left alone for longer than their TTL, by the wall clock. Ask about once a minute."""
        now = self._look_at(now)
        return [
            entry.head
            for entry in self._entries.values()
            if entry.head.ttl_s is not None and now - entry.used_at > entry.head.ttl_s
        ]

    def clear(self) -> None:
        """Forget all sessions, and remove their bytes.

        Raises:
            StorageError: some are there still.
        """
        self._entries.clear()
        self._references.clear()
        self._gone.clear()
        self._let_go.clear()
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
                    self._let_go |= {*entry.blocks, *entry.let_go}
                except Unsound:
                    self.num_damaged += 1
                except OSError:  # the next start will try again
                    self.num_damaged += 1
                    continue
                self._gone.add(name)

    def _read_again(self, name: str) -> None:
        """Know of a file what it says now."""
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
        self._let_go |= set(entry.let_go)
        self._references.update(set(entry.blocks))

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.head.session_id, entry.head.version]
        for key in set(entry.blocks):
            self._references[key] -= 1
            if not self._references[key]:
                del self._references[key]

    def _set_aside(self, name: str) -> None:
        """Rename a damaged file; of many the oldest go."""
        self.num_damaged += 1
        try:
            self._folder.rename(name, name + BAD)
            bad = sorted((name for name in self._folder.names() if name.endswith(BAD)), key=self._folder.modified_at)
            self._folder.unlink(bad[:-MAX_BAD_FILES])
        except StorageError:  # it will be met again at the next start
            return

    def _look_at(self, wall: float) -> float:
        """Our clock, after a look at the wall's."""
        if self._wall is not None:
            self._clock += min(max(0.0, wall - self._wall), MAX_STEP_S)
        elif self._clock == -math.inf or 0.0 <= wall - self._clock <= MAX_OFF_S:
            self._clock = wall
        self._wall = wall
        return self._clock


def _entry_of(said: dict[str, Any], file_name: str, file_nbytes: int) -> _Entry:
    """What a file's record says.

    Raises:
        Unsound: it says nothing that `SessionLog.save` would.
    """
    head, blocks = head_of(said, file_nbytes)
    try:
        saved_at, idle_s = float(said["clock"]["saved"]), float(said["clock"]["idle_s"])
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise Unsound("no times") from exc
    return _Entry(head, blocks, keys_of(said, "let_go"), file_name, saved_at, saved_at - idle_s)
