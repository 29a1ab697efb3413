"""How every file begins: what it says, the digests of its payloads, and a MAC over both. Knows not what they mean.

    magic 8 | JSON bytes 4 | number of digests 4 | MAC 32 | JSON | digests, 32 bytes each | payloads

The head comes first, so that a scan reads nothing else, and a file cut short keeps the payloads before the cut. It is
written last, when the payloads have been hashed on the way. Payloads lie end to end in the order of their digests, so
that no head can say that two overlap. The MAC covers the digests, and thereby all. SHA-256 is the fastest strong hash
here (1.7 GB/s, BLAKE2b 0.9); a checksum would not tell bytes that somebody made to match.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from mlx_mcp.storage.folder import Buffer, OpenFile

DIGEST_BYTES = 32
_HEAD = struct.Struct("<8sII32s")
_FIRST_READ = 1 << 16  # holds the head of a full segment, or of a session of 50,000 tokens


class Unsound(ValueError):
    """A file is not what was written."""


@dataclass(frozen=True)
class Head:
    """What a file says before its payloads."""

    meta: dict[str, Any]
    digests: tuple[bytes, ...]
    nbytes: int  # where the payloads begin


def digest(buffers: Iterable[Buffer]) -> bytes:
    """The digest of buffers laid end to end; lets other threads run meanwhile."""
    hashed = hashlib.sha256()
    for buffer in buffers:
        hashed.update(buffer)
    return hashed.digest()


def encode(meta: dict[str, Any]) -> bytes:
    """What `seal` and `head_nbytes` take."""
    return json.dumps(meta, separators=(",", ":")).encode()


def head_nbytes(meta: bytes, num_digests: int) -> int:
    """Where payloads begin."""
    return _HEAD.size + len(meta) + DIGEST_BYTES * num_digests


def seal(magic: bytes, key: bytes, meta: bytes, digests: Seq[bytes]) -> bytes:
    """A head. `key` is the folder's, or empty where the file leaves it."""
    said = meta + b"".join(digests)
    return _HEAD.pack(magic, len(meta), len(digests), _mac(magic, key, len(meta), said)) + said


def unseal(magic: bytes, key: bytes, file: OpenFile) -> Head:
    """Read a head; one read, if it is not very long.

    Raises:
        Unsound: it was not sealed with this key, or is not as it was sealed.
        OSError: it cannot be read.
    """
    first = file.read(min(_FIRST_READ, file.nbytes), 0)
    if len(first) < _HEAD.size:
        raise Unsound("cut short")
    found, meta_nbytes, num_digests, mac = _HEAD.unpack_from(first)
    if found != magic:
        raise Unsound("another kind of file, or another version")
    nbytes = _HEAD.size + meta_nbytes + DIGEST_BYTES * num_digests
    if nbytes > file.nbytes:
        raise Unsound("cut short")
    if nbytes > len(first):
        first += file.read(nbytes - len(first), len(first))
    said = first[_HEAD.size : nbytes]
    if not hmac.compare_digest(mac, _mac(magic, key, meta_nbytes, said)):
        raise Unsound("changed since it was written")
    try:
        meta = json.loads(said[:meta_nbytes])
    except (ValueError, RecursionError) as exc:
        raise Unsound("no JSON") from exc
    if not isinstance(meta, dict):
        raise Unsound("no object")
    cuts = range(meta_nbytes, len(said), DIGEST_BYTES)
    return Head(meta, tuple(said[cut : cut + DIGEST_BYTES] for cut in cuts), nbytes)


def _mac(magic: bytes, key: bytes, meta_nbytes: int, said: bytes) -> bytes:
    return hmac.digest(key, magic + meta_nbytes.to_bytes(4, "little") + said, "sha256")
