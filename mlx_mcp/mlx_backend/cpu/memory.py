"""How freed memory is kept on Linux, and how keys and values are copied there without MLX."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mcp.core.layout import Part
from mlx_mcp.mlx_backend.layers import Stack, payload


@cache
def keep_freed_memory(num_bytes: int) -> None:
    """Have glibc keep up to `num_bytes` of freed memory; with other C libraries nothing is done.

    By itself glibc returns to the system what is large or lies last, and a row's slots are both. When the system has to
    map them anew, a restore takes twice as long.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
            mallopt(-1, num_bytes)  # M_TRIM_THRESHOLD


def copy_tokens(
    stacks: Sequence[Stack],
    parts: Sequence[Part],
    start: int,
    end: int,
    planes: dict[int, list[mx.array]],
    slot: int,
) -> None:
    """Copy tokens [start, end) of the parts, end to end, to the beginning of a slot in the planes of each FULL layer.

    It is done at once and outside of MLX's graphs, since a thousand small operations take three times as long as the
    memory does. No computation that is under way may read or write that slot of the planes, which are evaluated.
    """
    mx.synchronize()
    for n, stack in enumerate(stacks):
        targets = [view(planes[i][k])[slot] for i, k in stack.planes]
        at = 0
        for part in parts:
            stop = at + part.num_tokens
            if start < stop and at < end:
                first, last = max(at, start), min(stop, end)
                source = view(payload(part).full[n])[:, :, first - at : last - at]
                for target, plane in zip(targets, source, strict=True):
                    target[:, first - start : last - start] = plane
            at = stop
        assert at >= end, f"{at} tokens where {end} are needed"


def view(array: mx.array) -> Any:
    """An array's own memory, to read and write; numpy has no bfloat16, and bytes are only copied here."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
