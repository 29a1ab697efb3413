"""How every file here is laid out: a safetensors file, with our record, digests and a MAC in its metadata.

    header length 8 | {"__metadata__":{"mac":…,"digests":…,"kind":…,"record":…},"<tensor>":{…},…} and spaces | payloads

Any reader of safetensors files finds the tensors. The header comes first, so that a scan reads nothing else, and a file
cut short keeps the payloads before the cut. It is written last, when the payloads have been hashed on the way: MAC and
digests have a fixed length. Spaces, which the format allows, have the payloads begin at a multiple of ALIGNMENT bytes.
Payloads lie end to end in the order of their digests, so that no header can say that two overlap. The MAC covers the
whole header, and by the digests thereby the file. SHA-256 is the fastest strong hash here (1.7 GB/s, BLAKE2b 0.9); a
checksum would not tell bytes that somebody made to match. The format:
https://github.com/huggingface/safetensors#format
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

SUFFIX = ".safetensors"  # MLX tells what a file is by that
ALIGNMENT = 64
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # of the format
DTYPE_BYTES = {"BOOL": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8} | {
    f"{sign}{8 * size}": size for sign in "UI" for size in (1, 2, 4, 8)
}
_BEGIN, _DIGESTS, _KIND = b'{"__metadata__":{"mac":"', b'","digests":"', b'","kind":'
_METADATA_AT = len(b'{"__metadata__":')
_HEX = 64  # of a MAC, and of a digest
_FIRST_READ = 1 << 16  # holds the header of a session of 100,000 tokens, and of most segments


class Unsound(ValueError):
    """A file is not what was written."""


@dataclass(frozen=True)
class Head:
    """What a file says before its payloads."""

    record: dict[str, Any]
    digests: tuple[bytes, ...]
    nbytes: int  # where the payloads begin


@dataclass(frozen=True)
class Draft:
    """A header that lacks its digests."""

    said: bytes  # all that follows them
    num_digests: int

    @property
    def nbytes(self) -> int:
        """Where the payloads begin."""
        return LENGTH_BYTES + len(_BEGIN) + _HEX + len(_DIGESTS) + _HEX * self.num_digests + len(self.said)

    def seal(self, key: bytes, digests: Seq[bytes]) -> bytes:
        """The header. `key` is the folder's, or empty where the file leaves it."""
        assert len(digests) == self.num_digests, f"{len(digests)} digests for {self.num_digests} payloads"
        length = (self.nbytes - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
        covered = _DIGESTS + b"".join(digests).hex().encode() + self.said
        return length + _BEGIN + _mac(key, length, covered) + covered


def digest(buffers: Iterable[Buffer]) -> bytes:
    """The digest of buffers laid end to end; lets other threads run meanwhile."""
    hashed = hashlib.sha256()
    for buffer in buffers:
        hashed.update(buffer)
    return hashed.digest()


def encode(record: Any) -> bytes:
    """As JSON, in ASCII and without spaces."""
    return json.dumps(record, separators=(",", ":")).encode()


def nbytes_of(tensor: Tensor) -> int:
    """What a tensor takes."""
    return DTYPE_BYTES[tensor.dtype] * prod(tensor.shape)


def entries(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Tensors that lie end to end, as a safetensors header says them."""
    said, at = {}, 0
    for tensor in tensors:
        end = at + nbytes_of(tensor)
        said[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    return said


def draft(kind: str, record: dict[str, Any], num_digests: int, tensors: Iterable[Tensor]) -> Draft:
    """A header that says so; the tensors lie end to end in the payloads, however these are parted for digests."""
    metadata = json.dumps(kind).encode() + b',"record":' + encode(encode(record).decode()) + b"}"
    listed = encode(entries(tensors))[1:]
    made = Draft(_KIND + metadata + (b"," if listed != b"}" else b"") + listed, num_digests)
    return Draft(made.said + b" " * (-made.nbytes % ALIGNMENT), num_digests)


def unseal(kind: str, key: bytes, file: OpenFile) -> Head:
    """Read a header; one read, if it is not very long.

    Raises:
        Unsound: it was not sealed with this key, or is not as it was sealed.
        OSError: it cannot be read.
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
    cuts = range(0, len(digests), _HEX // 2)
    return Head(record, tuple(digests[cut : cut + _HEX // 2] for cut in cuts), nbytes)


def _mac(key: bytes, length: bytes, covered: bytes) -> bytes:
    return hmac.digest(key, length + covered, "sha256").hex().encode()
