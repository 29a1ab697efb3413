"""Says whether a model's keys and values can be stored in few bits, and in groups of which size."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_mcp.core.slots import Slab, Slot
from mlx_mcp.errors import ModelError
from mlx_mcp.mlx_backend.cache_tree import leaves, regroup
from mlx_mcp.mlx_backend.prefill_cache import PrefillCache
from mlx_mcp.mlx_backend.slabs import FullLayer, KvBits


def group_size(caches: list[Any]) -> int:
    """The largest group size that divides the width of every head.

    Raises:
        ModelError: none does.
    """
    full: list[Any] = [cache for cache in caches if type(cache) is KVCache]
    widths = {array.shape[-1] for cache in full for array in (cache.keys, cache.values)}
    if not widths:
        raise not_quantizable("No layer keeps those of every token.")
    for size in (64, 32):
        if all(width % size == 0 for width in widths):
            return size
    raise not_quantizable(
        f"Heads must be a multiple of 32 wide; here they are {' and '.join(map(str, sorted(widths)))}."
    )


def try_quantized(model: Any, kv_bits: KvBits) -> None:
    """Build the graph of one quantized token through the model's attention; nothing is computed.

    Raises:
        ModelError: mlx-lm has no quantized attention of this kind.
    """
    template, slot = make_prompt_cache(model), Slot(Slab(0, capacity=1, num_slots=1), 0)
    flat = [PrefillCache(FullLayer(kv_bits), slot, 0) if type(leaf) is KVCache else leaf for leaf in leaves(template)]
    try:
        model(mx.array([[0]]), cache=regroup(template, flat))
    except ValueError as error:
        raise not_quantizable(f"mlx-lm says: {error}") from error


def not_quantizable(why: str) -> ModelError:
    """The error for a model whose keys and values cannot be quantized."""
    return ModelError(
        f"This model's keys and values cannot be quantized. {why} Start the server without kv_bits, or choose another "
        "model."
    )
