"""Sessions as the prompt caches of mlx_lm: a safetensors file that mlx_lm.models.cache saves and loads.

    metadata   0.<name>: the saver's own; 1.<layer>: the class of the layer's cache; 2.<n>: which tensors are scalars
    tensors    <layer>.<place in the class's state>

A prompt cache has no token ids, so we write them into the metadata, under "0.mlx_mcp". The states of the classes are:

    KVCache            keys, values, offset
    QuantizedKVCache   3 planes of keys, 3 of values, offset, group size, bits
    RotatingKVCache    keys, values, offset, keep, max size, index: where the next token goes in the ring
    ArraysCache        a list of states, left padding, lengths
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlx_mcp.core.layout import CacheKind, Form, LayerCache, Tensor
from mlx_mcp.core.ports import StoredBlock
from mlx_mcp.errors import StorageError
from mlx_mcp.storage.export import Exported
from mlx_mcp.storage.folder import OpenFile, Piece
from mlx_mcp.storage.sealed import ALIGNMENT, DTYPE_BYTES, LENGTH_BYTES, MAX_HEADER_BYTES, encode, entries, nbytes_of
from mlx_mcp.storage.segment import Record

PARTS = ("keys", "keys.scales", "keys.biases", "values", "values.scales", "values.biases")
PLACES = {False: {"keys": "0", "values": "1"}, True: {part: f"{n // 3}.{n % 3}" for n, part in enumerate(PARTS)}}
CLASSES = {CacheKind.WINDOW: "RotatingKVCache", CacheKind.STATE: "ArraysCache"}
NOT_OURS = "is no prompt cache that mlx_lm wrote"


# -- out


@dataclass(frozen=True)
class Plane:
    """A tensor of a prompt cache, and the tensor in each block from which it is made."""

    tensor: Tensor
    source: str  # the name in blocks
    first: int | None  # the position of its first token; None for states


def pieces_of(exported: Exported, model: str) -> Iterator[Piece]:
    """The pieces of a session's prompt cache, for a model that mlx_lm finds by this path or name.

    Raises:
        StorageError: there can be no prompt cache of this session.
        Unsound: a block is not what was written.
        OSError: a block cannot be read.
    """
    record, num_tokens = exported.record, exported.record.num_kept
    if not num_tokens or not exported.blocks:
        raise StorageError(
            "The session has no keys and values on disk: take a turn in it, persist it, and export again."
        )
    end = exported.blocks[-1].start + len(exported.blocks[-1].tokens)
    layers = exported.blocks[-1].form.layers
    if not layers:
        raise StorageError(
            "This model's layers have several caches each, and a prompt cache has one. Export without --as."
        )
    if end != num_tokens and any(layer.kind is not CacheKind.FULL for layer in layers):
        raise StorageError("The session ends within a block. Take another turn in it, persist it, and export again.")
    planes, scalars = [], dict[str, int | None]()
    for i, layer in enumerate(layers):
        planes += planes_of(exported, i, layer, num_tokens)
        scalars |= {f"{i}.{place}": value for place, value in scalars_of(layer, num_tokens).items()}
    own = {"tokens": list(record.tokens), "num_kept": num_tokens, "after": record.after, "model": record.model}
    own["fingerprint"] = record.fingerprint.hex()
    metadata = {"0.model": model, "0.tokenizer_config": "{}", "0.mlx_mcp": encode(own).decode()}
    metadata |= {f"1.{i}": class_of(layer) for i, layer in enumerate(layers)}
    metadata |= {"2.0": ""}
    for n, (name, value) in enumerate(scalars.items(), 1):
        metadata |= {f"2.{n}.0": name, f"2.{n}.1": "none" if value is None else "scalar"}
    tensors = [plane.tensor for plane in planes]
    tensors += [
        Tensor(name, "F32", (0,)) if value is None else Tensor(name, "I32", ()) for name, value in scalars.items()
    ]
    header = encode({"__metadata__": metadata} | entries(tensors))
    header += b" " * (-(LENGTH_BYTES + len(header)) % ALIGNMENT)
    yield 0, (len(header).to_bytes(LENGTH_BYTES, "little"), header)
    at = LENGTH_BYTES + len(header)
    offsets = []
    for plane in planes:
        offsets.append(at)
        at += nbytes_of(plane.tensor)
    yield at, [value.to_bytes(4, "little") for value in scalars.values() if value is not None]
    for batch in exported.batches():
        for block in batch:
            data = memoryview(b"".join(block.data))
            for plane, offset in zip(planes, offsets, strict=True):
                yield from copied(block, data, plane, offset, num_tokens)


def class_of(layer: LayerCache) -> str:
    """The class of such a cache in mlx_lm."""
    return CLASSES.get(layer.kind) or ("QuantizedKVCache" if layer.bits else "KVCache")


def scalars_of(layer: LayerCache, num_tokens: int) -> dict[str, int | None]:
    """The values in a cache's state that are not tensors, by their places."""
    said: dict[str, int | None] = {"2": num_tokens}
    if layer.kind is CacheKind.STATE:
        said = {"1": None, "2": None}
    elif layer.kind is CacheKind.WINDOW:
        said |= {"3": 0, "4": layer.window, "5": min(num_tokens, layer.window)}
    elif layer.bits:
        said |= {"3": layer.group_size, "4": layer.bits}
    return said


def planes_of(exported: Exported, i: int, layer: LayerCache, num_tokens: int) -> list[Plane]:
    """The tensors of a layer's cache.

    Raises:
        StorageError: a part of the tokens that it needs is not there.
    """
    blocks = exported.blocks
    found = {tensor.name: tensor for tensor in blocks[-1].form.tensors if tensor.name.startswith(f"layers.{i}.")}
    planes = []
    for name, tensor in found.items():
        part = name.removeprefix(f"layers.{i}.")
        if layer.kind is CacheKind.STATE:
            place = f"0.{part.removeprefix('state.')}"
            planes.append(Plane(Tensor(f"{i}.{place}", tensor.dtype, (1, *tensor.shape)), name, None))
            continue
        first = max(0, num_tokens - layer.window) if layer.kind is CacheKind.WINDOW else 0
        there = sum(overlap(block, name, first, num_tokens) for block in blocks)
        if there < num_tokens - first:
            raise StorageError("A part of the session's latest keys and values is not on disk. Persist it again.")
        heads, _, width = tensor.shape
        shape = (1, heads, num_tokens - first, width)
        planes.append(Plane(Tensor(f"{i}.{PLACES[layer.bits > 0][part]}", tensor.dtype, shape), name, first))
    if not planes:
        raise StorageError(f"Of layer {i} the session's last block has nothing. Persist it again.")
    return planes


def overlap(block: Record, name: str, first: int, last: int) -> int:
    """How many of the tokens [first, last) the tensor of that name in a block has."""
    count = next((tensor.shape[1] for tensor in block.form.tensors if tensor.name == name), 0)
    end = block.start + len(block.tokens)
    return max(0, min(end, last) - max(end - count, first))


def copied(block: StoredBlock, data: memoryview, plane: Plane, offset: int, num_tokens: int) -> Iterator[Piece]:
    """The pieces with a block's part of a plane, for a file in which the plane begins at `offset`."""
    at = 0
    for tensor in block.form.tensors:
        size = nbytes_of(tensor)
        if tensor.name == plane.source:
            break
        at += size
    else:
        return
    if plane.first is None:
        if block.start + len(block.tokens) == num_tokens:
            yield offset, (data[at : at + size],)
        return
    heads, count, width = tensor.shape
    row = width * DTYPE_BYTES[tensor.dtype]
    begin = block.start + len(block.tokens) - count  # what is there of a window ends where the block does
    first, last = max(begin, plane.first), min(begin + count, num_tokens)
    for head in range(heads if first < last else 0):
        source = at + (head * count + first - begin) * row
        target = offset + (head * plane.tensor.shape[2] + first - plane.first) * row
        yield target, (data[source : source + (last - first) * row],)


# -- in


@dataclass(frozen=True)
class Source:
    """Where the tokens of a plane are in a file."""

    tensor: Tensor
    offset: int
    order: range | list[int] | None  # the rows of the latest tokens, in order; None for states


@dataclass(frozen=True)
class PromptCache:
    """A prompt cache in a file that is open."""

    file: OpenFile
    metadata: dict[str, str]  # the saver's own
    num_tokens: int
    layers: tuple[LayerCache, ...]
    planes: tuple[tuple[LayerCache, str, Source], ...]  # with their names in blocks

    def blocks(
        self, tokens: tuple[int, ...], block_tokens: int, root: bytes, key: Callable[[bytes, tuple[int, ...]], bytes]
    ) -> Iterator[StoredBlock]:
        """Make blocks of these tokens. `key` makes a block's key from its parent's; the first parent's is `root`."""
        assert len(tokens) == self.num_tokens, f"{len(tokens)} tokens for a cache of {self.num_tokens}"
        for start in range(0, self.num_tokens, block_tokens):
            some = tokens[start : start + block_tokens]
            end = start + len(some)
            tensors, data, window_start = [], [], start
            for layer, name, source in self.planes:
                if source.order is None:
                    if end == self.num_tokens:
                        tensors.append(replace(source.tensor, name=name, shape=source.tensor.shape[1:]))
                        data.append(self.file.read(nbytes_of(source.tensor), source.offset))
                    continue
                tensor, read = self._rows(source, start, end)
                tensors.append(replace(tensor, name=name))
                data.append(read)
                if layer.kind is CacheKind.WINDOW:
                    window_start = max(window_start, end - tensor.shape[1])
            has_state = end == self.num_tokens or all(layer.kind is not CacheKind.STATE for layer in self.layers)
            form, views = Form(self.layers, tuple(tensors)), tuple(memoryview(part) for part in data)
            parent, root = root, key(root, some)
            yield StoredBlock(root, parent, start, some, window_start, has_state, form, views)

    def _rows(self, source: Source, start: int, end: int) -> tuple[Tensor, bytes]:
        """Read tokens [start, end) of a plane, as far as it has them."""
        assert source.order is not None, "states have no tokens"
        _, heads, capacity, width = source.tensor.shape
        first = self.num_tokens - len(source.order)
        rows = source.order[max(0, start - first) : max(0, end - first)]
        row = width * DTYPE_BYTES[source.tensor.dtype]
        parts = []
        for head in range(heads):
            at = source.offset + head * capacity * row
            if isinstance(rows, range):
                parts.append(self.file.read(len(rows) * row, at + rows.start * row if rows else at))
            else:
                parts += [self.file.read(row, at + n * row) for n in rows]
        return replace(source.tensor, shape=(heads, len(rows), width)), b"".join(parts)


def is_prompt_cache(file: OpenFile) -> bool:
    """Whether a file looks like a prompt cache."""
    try:
        metadata, _ = read_header(file)
    except ValueError:
        return False
    return "2.0" in metadata and "1.0" in metadata


def read_header(file: OpenFile) -> tuple[dict[str, str], dict[str, tuple[Tensor, int]]]:
    """The metadata of a safetensors file, and its tensors with their places.

    Raises:
        ValueError: the file is not a safetensors file.
        OSError: the file cannot be read.
    """
    length = int.from_bytes(file.read(LENGTH_BYTES, 0), "little")
    begin = LENGTH_BYTES + length
    if begin > min(file.nbytes, LENGTH_BYTES + MAX_HEADER_BYTES):
        raise ValueError("longer than the file")
    try:
        header = json.loads(file.read(length, LENGTH_BYTES))
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
        tensors = {}
        for name, said in header.items():
            tensor = Tensor(name, said["dtype"], tuple(said["shape"]))
            first, end = said["data_offsets"]
            if not 0 <= first <= end <= file.nbytes - begin or end - first != nbytes_of(tensor):
                raise ValueError(f"{name} is not where it should be")
            tensors[name] = tensor, begin + first
    except (KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ValueError("no header") from exc
    return metadata, tensors


def read_prompt_cache(file: OpenFile, file_name: str) -> PromptCache:
    """Read the prompt cache in a file.

    Raises:
        StorageError: the file is not a prompt cache, or not one that a session can have; the text says why.
        OSError: the file cannot be read.
    """
    try:
        metadata, tensors = read_header(file)
        nones = {metadata[f"{name[:-2]}.0"] for name, value in metadata.items() if name[:2] == "2." and value == "none"}
        tensors = {name: found for name, found in tensors.items() if name not in nones}

        def scalar(name: str) -> int:
            tensor, at = tensors[name]
            return int.from_bytes(file.read(nbytes_of(tensor), at), "little", signed=True)

        layers, planes, lengths = [], list[tuple[LayerCache, str, Source]](), set[int]()
        for i in range(sum(name.startswith("1.") for name in metadata)):
            layer = read_layer(i, metadata[f"1.{i}"], scalar, set(tensors))
            layers.append(layer)
            order: range | list[int] | None = None
            if layer.kind is not CacheKind.STATE:
                lengths.add(scalar(f"{i}.2"))
                order = ring(i, scalar, tensors[f"{i}.0"][0], layer) if layer.window else range(scalar(f"{i}.2"))
            for place, part in places(i, layer, tensors).items():
                tensor, at = tensors[f"{i}.{place}"]
                if tensor.shape[:1] != (1,) or (order is not None and not fits(tensor, order)):
                    raise ValueError(f"{tensor.name} has another shape than its cache says")
                planes.append((layer, f"layers.{i}.{part}", Source(tensor, at, order)))
        own = {name.removeprefix("0."): value for name, value in metadata.items() if name.startswith("0.")}
        if not lengths and "mlx_mcp" in own:  # states alone do not say of how many tokens they are
            lengths = {int(json.loads(own["mlx_mcp"])["num_kept"])}
        if not lengths:
            raise StorageError(
                f"{file_name} has states alone, which do not say of how many tokens they are. Of such a model only "
                "what `mlx-mcp sessions export` wrote can be taken in."
            )
        if len(lengths) != 1 or not min(lengths) > 0:
            raise StorageError(f"The layers of {file_name} do not say alike how many tokens there are. Write it again.")
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise StorageError(f"{file_name} {NOT_OURS} ({exc}). Have mlx_lm.cache_prompt write it again.") from exc
    return PromptCache(file, own, lengths.pop(), tuple(layers), tuple(in_order(planes)))


def read_layer(i: int, name: str, scalar: Callable[[str], int], tensors: set[str]) -> LayerCache:
    """The cache of a layer, by the name of its class.

    Raises:
        StorageError: sessions cannot have such a cache.
    """
    match name:
        case "KVCache":
            return LayerCache(CacheKind.FULL)
        case "QuantizedKVCache":
            return LayerCache(CacheKind.FULL, 0, scalar(f"{i}.3"), scalar(f"{i}.4"))
        case "RotatingKVCache" if scalar(f"{i}.3"):
            raise StorageError(
                "The prompt cache keeps its first tokens and drops later ones (--max-kv-size), which sessions never "
                "do. Have mlx_lm.cache_prompt write it without that."
            )
        case "RotatingKVCache":
            return LayerCache(CacheKind.WINDOW, scalar(f"{i}.4"))
        case "ArraysCache" if not tensors & {f"{i}.1", f"{i}.2"}:
            return LayerCache(CacheKind.STATE)
    raise StorageError(f"Layer {i} of the prompt cache is a {name}, of which sessions have none. Choose another model.")


def ring(i: int, scalar: Callable[[str], int], keys: Tensor, layer: LayerCache) -> range | list[int]:
    """The rows of a ring that hold its latest tokens, in order, as in RotatingKVCache._temporal_order."""
    capacity, offset, index = keys.shape[2], scalar(f"{i}.2"), scalar(f"{i}.5")
    rows: range | list[int] = range(index)
    if index < capacity and index < offset:
        rows = [*range(index, capacity), *range(index)]
    return rows[-min(layer.window, offset) :]


def fits(tensor: Tensor, order: range | list[int]) -> bool:
    """Whether a plane has these rows."""
    return len(tensor.shape) == 4 and len(order) > 0 and 0 <= min(order) <= max(order) < tensor.shape[2]


def places(i: int, layer: LayerCache, tensors: dict[str, tuple[Tensor, int]]) -> dict[str, str]:
    """The parts of a layer's cache by their places in its state."""
    if layer.kind is CacheKind.STATE:
        count = sum(name.startswith(f"{i}.0.") for name in tensors)
        return {f"0.{k}": f"state.{k}" for k in range(count)}
    return {place: part for part, place in PLACES[layer.bits > 0].items()}


def in_order(planes: list[tuple[LayerCache, str, Source]]) -> list[tuple[LayerCache, str, Source]]:
    """The planes in the order of a payload: by kind, and then by shape."""
    found: dict[Any, list[tuple[LayerCache, str, Source]]] = {}
    for kind in CacheKind:
        for layer, name, source in planes:
            if layer.kind is kind:
                shape = source.tensor.shape[1:]
                alike = shape if kind is CacheKind.STATE else (shape[0], shape[2])
                found.setdefault((kind, layer.window, source.tensor.dtype, alike), []).append((layer, name, source))
    return [plane for alike in found.values() for plane in alike]
