"""Chooses how a model's rows are held, by what its architecture allows, and what a row costs."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_mcp.core.slots import CPU_SLABS, KvCost
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.architectures import architecture, is_allowed, must_run_alone, reuse_refusal
from mlx_mcp.mlx_backend.cache_tree import leaves
from mlx_mcp.mlx_backend.hook import hook
from mlx_mcp.mlx_backend.kv_quantization import group_size, not_quantizable, try_quantized
from mlx_mcp.mlx_backend.layers import Codec
from mlx_mcp.mlx_backend.padded_rows import PaddedRows
from mlx_mcp.mlx_backend.rows import Rows, SoloRows
from mlx_mcp.mlx_backend.slabs import FullLayer, KvBits
from mlx_mcp.mlx_backend.slotted_rows import SlottedRows


def make_rows(model: Any, kv_bits: int | None, chunk_tokens: int) -> Rows:
    """The best way to hold this model's rows; no chunk is longer than `chunk_tokens`.

    Raises:
        ModelError: `kv_bits` is set, and the model's keys and values cannot be quantized.
    """
    caches = make_prompt_cache(model)
    rows = rows_class(model, {type(leaf) for leaf in leaves(caches)})
    nested = len(leaves(caches)) > len(caches)
    model(mx.array([[0]]), cache=caches)  # to see what its keys and values look like
    mx.eval([cache.state for cache in caches])
    if rows is SlottedRows:
        hook(model)
        quantized = None if kv_bits is None else KvBits(kv_bits, group_size(leaves(caches)))
        if quantized is not None:
            try_quantized(model, quantized)
        cost = kv_cost(leaves(caches), quantized, SlottedRows, chunk_tokens)
        codec = Codec(leaves(caches), quantized, True, reuse_refusal(model, caches), nested)
        return SlottedRows(model, cost, codec, quantized)
    if kv_bits is not None:
        raise not_quantizable(f"The architecture {architecture(model)!r} reads them itself.")
    cost = kv_cost(leaves(caches), None, rows, chunk_tokens)
    return rows(model, cost, Codec(leaves(caches), None, False, reuse_refusal(model, caches), nested))


def rows_class(model: Any, kinds: set[type]) -> type[Rows]:
    """How the rows of a model with these kinds of caches are held."""
    if must_run_alone(model):
        return SoloRows
    if is_allowed(model) and kinds <= {KVCache, RotatingKVCache, ArraysCache}:
        return SlottedRows
    return PaddedRows if all(hasattr(kind, "merge") for kind in kinds) else SoloRows


def kv_cost(caches: list[Any], quantized: KvBits | None, rows: type[Rows], chunk_tokens: int) -> KvCost:
    """What a row costs at most, computed from caches that hold one token."""
    token_bytes, state_bytes, snapshot_bytes, windows = 0, 0, 0, []
    layer = FullLayer(quantized)
    for cache in caches:
        kind = type(cache)
        if kind is KVCache:
            one = [plane for x in (cache.keys, cache.values) for plane in layer.encode(x[..., :1, :])]
            each = sum(plane.nbytes for plane in one)
            token_bytes += each
            state_bytes += 0 if rows is SlottedRows else cache.step * each  # what mlx-lm keeps in reserve
        elif kind in (RotatingKVCache, ChunkedKVCache):
            each = cache.nbytes // cache.keys.shape[2]
            windows.append((cache.max_size if kind is RotatingKVCache else cache.chunk_size, each))
            state_bytes += max(cache.step, chunk_tokens) * each  # a ring holds a whole chunk besides its window
        elif kind is ArraysCache:
            state_bytes += cache.nbytes
            snapshot_bytes += cache.nbytes
        else:  # a model's own: it may keep as much of every token
            token_bytes += cache.nbytes
    slabs = device.slab_sizes() if rows is SlottedRows else CPU_SLABS  # others keep a row where they like
    return KvCost(token_bytes, tuple(windows), state_bytes, snapshot_bytes, rows is PaddedRows, slabs)
