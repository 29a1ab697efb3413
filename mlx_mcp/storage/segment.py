"""The content of a segment, which is a file of blocks: its header, and the blocks in it. Opens no files."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mlx_mcp.core.layout import CacheKind, Form, LayerCache, Tensor
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.storage.sealed import DTYPE_BYTES, Draft, Head, Unsound, draft, nbytes_of

KIND = "mlx-mcp blocks 1"
SUFFIX = ".blocks.safetensors"
OLD_SUFFIX = ".blocks"  # of files that an earlier version wrote in another form
MAX_SEGMENT_BLOCKS = 64
MAX_SEGMENT_BYTES = 64_000_000
PROPERTIES = ("keys", "parents", "starts", "tokens", "window_starts", "has_state", "form")  # of blocks, in a record


@dataclass(frozen=True, slots=True)
class Record:
    """The part of a header that describes one block."""

    key: bytes
    parent: bytes
    start: int
    tokens: array[int]
    window_start: int
    has_state: bool
    form: Form
    nbytes: int
    offset: int  # in the file
    digest: bytes

    @property
    def rank(self) -> tuple[bool, int]:
        """Of two blocks of a key the one of higher rank is richer: it can replace the other."""
        return self.has_state, -self.window_start

    def to_block(self, data: bytes) -> StoredBlock:
        """Make the block, with its payload."""
        return StoredBlock(
            self.key,
            self.parent,
            self.start,
            tuple(self.tokens),
            self.window_start,
            self.has_state,
            self.form,
            (memoryview(data),),
        )


@dataclass(eq=False)
class Segment:
    """One file of blocks."""

    name: str
    serial: int  # later files have higher numbers
    nbytes: int
    offload: bool  # whether an offload wrote it, and not a session that was persisted
    records: dict[bytes, Record] = field(default_factory=dict)  # of all blocks in its header, by key


class SegmentDraft:
    """A segment that is to be written."""

    def __init__(self, blocks: Seq[StoredBlock], serial: int, offload: bool) -> None:
        self.blocks, self.serial, self.offload = blocks, serial, offload
        record = {"serial": serial, "offload": offload} | describe(blocks)
        self.header: Draft = draft(KIND, record, len(blocks), tensors_of(blocks))
        self.nbytes = self.header.nbytes + sum(block.nbytes for block in blocks)

    def to_segment(self, name: str, digests: Seq[bytes]) -> Segment:
        """The segment, once its file is there."""
        records, offset = {}, self.header.nbytes
        for block, found in zip(self.blocks, digests, strict=True):
            records[block.key] = record_of(block, offset, found)
            offset += block.nbytes
        return Segment(name, self.serial, self.nbytes, self.offload, records)


def record_of(block: StoredBlock, offset: int, found: bytes) -> Record:
    """The record of a block whose payload begins at `offset` and has the digest `found`."""
    return Record(
        block.key,
        block.parent,
        block.start,
        array("I", block.tokens),
        block.window_start,
        block.has_state,
        block.form,
        block.nbytes,
        offset,
        found,
    )


def drafts(blocks: Seq[StoredBlock], serial: int, offload: bool) -> list[SegmentDraft]:
    """Split blocks into segments, the first of which has this serial number."""
    made: list[SegmentDraft] = []
    first = nbytes = 0
    for at, block in enumerate((*blocks, None)):
        full = at - first == MAX_SEGMENT_BLOCKS or (block and nbytes + block.nbytes > MAX_SEGMENT_BYTES)
        if at > first and (block is None or full):
            made.append(SegmentDraft(blocks[first:at], serial + len(made), offload))
            first, nbytes = at, 0
        nbytes += block.nbytes if block else 0
    return made


def tensors_of(blocks: Iterable[StoredBlock | Record]) -> list[Tensor]:
    """The tensors of blocks that lie one after another. The names of the nth block's begin with "blocks.n."."""
    return [
        Tensor(f"blocks.{n}.{tensor.name}", tensor.dtype, tensor.shape)
        for n, block in enumerate(blocks)
        for tensor in block.form.tensors
    ]


def describe(blocks: Seq[StoredBlock | Record]) -> dict[str, Any]:
    """Describe blocks for a header: a list for each property, and each of their forms once.

    An object for each block would repeat the names, whose quotes are escaped in the header. A start read such headers
    more than twice as slowly.
    """
    forms: dict[Form, int] = {}
    for block in blocks:
        assert sum(map(nbytes_of, block.form.tensors)) == block.nbytes, "a form of other bytes"
        forms.setdefault(block.form, len(forms))
    return {
        "keys": [block.key.hex() for block in blocks],
        "parents": [block.parent.hex() for block in blocks],
        "starts": [block.start for block in blocks],
        "tokens": [list(block.tokens) for block in blocks],
        "window_starts": [block.window_start for block in blocks],
        "has_state": [block.has_state for block in blocks],
        "form": [forms[block.form] for block in blocks],
        "forms": [describe_form(form) for form in forms],
    }


def describe_form(form: Form) -> dict[str, Any]:
    """Describe a form for a header."""
    return {
        "layers": [[layer.kind, layer.window, layer.group_size, layer.bits] for layer in form.layers],
        "tensors": [[tensor.name, tensor.dtype, *tensor.shape] for tensor in form.tensors],
    }


def read_form(said: Any) -> tuple[Form, int]:
    """Read a form, and the size of a payload of that form in bytes.

    Raises:
        Unsound: it is not what `describe_form` returns.
    """
    return _read_form(json.dumps(said))


@lru_cache(256)  # most blocks of a folder are of one form, which thousands of headers describe
def _read_form(text: str) -> tuple[Form, int]:
    said = json.loads(text)
    try:
        layers = tuple(LayerCache(CacheKind(kind), *numbers) for kind, *numbers in said["layers"])
        tensors = tuple(Tensor(name, dtype, tuple(shape)) for name, dtype, *shape in said["tensors"])
        sizes = [size for tensor in tensors for size in tensor.shape]
        sizes += [number for layer in layers for number in (layer.window, layer.group_size, layer.bits)]
        if any(type(size) is not int or not 0 <= size < 1 << 48 for size in sizes):
            raise Unsound("a number that is none")
        names = {tensor.name for tensor in tensors if type(tensor.name) is str and tensor.dtype in DTYPE_BYTES}
        if len(names) < len(tensors):
            raise Unsound("a tensor of no name or type, or twice")
        return Form(layers, tensors), sum(map(nbytes_of, tensors))
    except (KeyError, TypeError, ValueError) as exc:
        raise Unsound("no form") from exc


def records_of(record: dict[str, Any], digests: Seq[bytes], offset: int) -> list[Record]:
    """Read the records of blocks whose payloads begin at `offset`.

    Raises:
        Unsound: it is not what `describe` returns.
    """
    records = []
    try:
        forms = [read_form(form) for form in record["forms"]]
        columns = [record[name] for name in PROPERTIES]
        for key, parent, start, tokens, window_start, has_state, at, found in zip(*columns, digests, strict=True):
            numbers = start, window_start, at
            if any(type(number) is not int or number < 0 for number in numbers) or type(has_state) is not bool:
                raise Unsound("a number that is none")
            form, nbytes = forms[at]
            records.append(
                Record(
                    bytes.fromhex(key),
                    bytes.fromhex(parent),
                    start,
                    array("I", tokens),
                    window_start,
                    has_state,
                    form,
                    nbytes,
                    offset,
                    found,
                )
            )
            offset += nbytes
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as exc:
        raise Unsound("no description of blocks") from exc
    return records


def read_segment(name: str, head: Head, file_nbytes: int) -> Segment:
    """Read the segment of that name from its header.

    Raises:
        Unsound: it is not what a `SegmentDraft` writes.
    """
    serial, offload = head.record.get("serial"), head.record.get("offload")
    if type(serial) is not int or type(offload) is not bool:
        raise Unsound("no segment")
    records = records_of(head.record, head.digests, head.nbytes)
    by_key = {record.key: record for record in records}
    if len(by_key) < len(records):
        raise Unsound("a block twice")
    return Segment(name, serial, file_nbytes, offload, by_key)
