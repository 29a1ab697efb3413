"""How every file here is laid out: a safetensors file, with our record, digests and a MAC in its metadata.

    header length 8 | {"__metadata__":{"mac":…,"digests":…,"kind":…,"record":…},"<tensor>":{…},…} and spaces | payloads

Any reader of safetensors files finds the tensors. The header comes first, so that a scan reads nothing else, and a
truncated file keeps its first payloads. It is written last, after the payloads were hashed: MAC and digests have a
fixed length. Spaces, which the format allows, make the payloads begin at a multiple of ALIGNMENT bytes. Payloads lie
one after another in the order of their digests, so that no header can say that two overlap. The MAC covers the whole
header, and through the digests the file. SHA-256 is the fastest strong hash here (1.7 GB/s, BLAKE2b 0.9). A checksum
would not detect bytes that somebody made to match. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import prod
from typing import Any

from mlx_mcp.core.layout import Tensor
from mlx_mcp.storage.folder import Buffer, OpenFile

SUFFIX = ".safetensors"  # by which MLX recognises the format
ALIGNMENT = 64
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's limit
DTYPE_BYTES = {"BOOL": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8} | {
    f"{sign}{8 * size}": size for sign in "UI" for size in (1, 2, 4, 8)
}
_BEGIN, _DIGESTS, _KIND = b'{"__metadata__":{"mac":"', b'","digests":"', b'","kind":'
_METADATA_AT = len(b'{"__metadata__":')
_HEX = 64  # of a MAC, and of a digest
_FIRST_READ = 1 << 16  # holds the header of a session of 100,000 tokens, and of most segments


class Unsound(ValueError):
    """A file is not what was written. The text says why."""


@dataclass(frozen=True)
class Head:
    """The content of a header."""

    record: dict[str, Any]
    digests: tuple[bytes, ...]
    nbytes: int  # where the payloads begin


@dataclass(frozen=True)
class Draft:
    """A header whose digests are not known yet."""

    said: bytes  # all that follows the digests
    num_digests: int

    @property
    def nbytes(self) -> int:
        """Where the payloads begin."""
        return LENGTH_BYTES + len(_BEGIN) + _HEX + len(_DIGESTS) + _HEX * self.num_digests + len(self.said)

    def seal(self, key: bytes, digests: Seq[bytes]) -> bytes:
        """The whole header. `key` is the folder's, or empty for a file that leaves the folder."""
        assert len(digests) == self.num_digests, f"{len(digests)} digests for {self.num_digests} payloads"
        length = (self.nbytes - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
        covered = _DIGESTS + b"".join(digests).hex().encode() + self.said
        return length + _BEGIN + _mac(key, length, covered) + covered


def digest(buffers: Iterable[Buffer]) -> bytes:
    """The digest of concatenated buffers. Other threads can run meanwhile."""
    hashed = hashlib.sha256()
    for buffer in buffers:
        hashed.update(buffer)
    return hashed.digest()


def encode(record: Any) -> bytes:
    """A record as JSON, in ASCII and without spaces."""
    return json.dumps(record, separators=(",", ":")).encode()


def nbytes_of(tensor: Tensor) -> int:
    """The size of a tensor in bytes."""
    return DTYPE_BYTES[tensor.dtype] * prod(tensor.shape)


def entries(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """The entries of a safetensors header for tensors that lie one after another."""
    said, at = {}, 0
    for tensor in tensors:
        end = at + nbytes_of(tensor)
        said[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    return said


def draft(kind: str, record: dict[str, Any], num_digests: int, tensors: Iterable[Tensor]) -> Draft:
    """Make a header. The tensors lie one after another in the payloads, which need not be split as the tensors are."""
    metadata = json.dumps(kind).encode() + b',"record":' + encode(encode(record).decode()) + b"}"
    listed = encode(entries(tensors))[1:]
    made = Draft(_KIND + metadata + (b"," if listed != b"}" else b"") + listed, num_digests)
    return Draft(made.said + b" " * (-made.nbytes % ALIGNMENT), num_digests)


def unseal(kind: str, key: bytes, file: OpenFile) -> Head:
    """Read a header. This takes one read, if it is not very long.

    Raises:
        Unsound: the header was not sealed with this key, or was changed since.
        OSError: the file cannot be read.
    """
    first = file.read(min(_FIRST_READ, file.nbytes), 0)
    length = first[:LENGTH_BYTES]
    nbytes = LENGTH_BYTES + int.from_bytes(length, "little")
    if len(length) < LENGTH_BYTES or first[LENGTH_BYTES : LENGTH_BYTES + len(_BEGIN)] != _BEGIN:
        raise Unsound("another kind of file, or another version")
    if nbytes > min(file.nbytes, LENGTH_BYTES + MAX_HEADER_BYTES):
        raise Unsound("cut short")
    if nbytes > len(first):
        first += file.read(nbytes - len(first), len(first))
    begin = LENGTH_BYTES + len(_BEGIN)
    mac, covered = first[begin : begin + _HEX], first[begin + _HEX : nbytes]
    if not hmac.compare_digest(mac, _mac(key, length, covered)):
        raise Unsound("changed since it was written")
    try:
        metadata, _ = json.JSONDecoder().raw_decode(first[LENGTH_BYTES:nbytes].decode(), _METADATA_AT)
        if metadata["kind"] != kind:
            raise Unsound("another kind of file, or another version")
        record, digests = json.loads(metadata["record"]), bytes.fromhex(metadata["digests"])
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise Unsound("no JSON") from exc
    if not isinstance(record, dict):
        raise Unsound("no object")
    starts = range(0, len(digests), _HEX // 2)
    return Head(record, tuple(digests[start : start + _HEX // 2] for start in starts), nbytes)


def _mac(key: bytes, length: bytes, covered: bytes) -> bytes:
    return hmac.digest(key, length + covered, "sha256").hex().encode()
