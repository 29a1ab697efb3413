"""Puts attention under unmodified models.

mlx-lm's models pass what their cache returns to `scaled_dot_product_attention`, a name of their own module. `hook`
replaces it by `attend`, which leaves attention to the cache. So the linear layers run over the whole batch, and each
cache attends to every row's own keys and values, none of which is padded to the longest row's length. Engine thread
only.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

mlx_lm_attention: Any = base.scaled_dot_product_attention


class AttendingCache(ABC):
    """A cache that computes attention over what it keeps, as mlx-lm's models use it."""

    dtype: mx.Dtype  # of the values that were appended last

    def keys_and_values(self) -> tuple[Handle, Handle]:
        """Stand-ins for the keys and for the values. Models call this too, for layers that share them."""
        handle = Handle(self, self.dtype)
        return handle, handle

    @abstractmethod
    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        """Attention of queries [rows, heads, tokens, head_dim] over each row's own keys and values."""


class Handle:
    """What an AttendingCache returns in place of keys and of values.

    A model can pass it to attention, in this layer or in another that shares its keys and values, and to nothing else:
    a model that looks into its keys fails at once, where the keys of the latest token alone would give wrong answers.
    """

    def __init__(self, cache: AttendingCache, dtype: mx.Dtype) -> None:
        self.cache = cache  # which must not refer to this: a cycle would keep tensors until the garbage is collected
        self.dtype = dtype  # some models convert what attention returns to the type of their values


def attend(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """What the models call in place of mlx-lm's function, with the same arguments."""
    if isinstance(keys, Handle):
        return keys.cache.attend(queries, scale, mask, sinks)
    out: mx.array = mlx_lm_attention(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    return out


def model_modules(model: Any) -> set[ModuleType]:
    """The Python modules in which the classes of the model's layers are defined, and the classes that they inherit."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    return {sys.modules[cls.__module__] for cls in classes}


def hook(model: Any) -> None:
    """Replace mlx-lm's function by `attend` in all modules of the model."""
    for module in model_modules(model):
        if getattr(module, "scaled_dot_product_attention", None) is mlx_lm_attention:
            module.scaled_dot_product_attention = attend  # type: ignore[attr-defined]  # looked for just above
