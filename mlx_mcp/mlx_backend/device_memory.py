"""What the device says of its memory, and the limits that MLX keeps itself. Imports no mlx_lm, which takes a second."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx

from mlx_mcp.core.memory import Budget, DeviceMemory
from mlx_mcp.errors import ConfigError
from mlx_mcp.mlx_backend import device

CUDA_SHARE = 7 / 8  # of a GPU's memory: the rest is for its context, its libraries, and other processes


def device_memory() -> DeviceMemory:
    """What the device in force has. A GPU that does not say it counts as one that shares the machine's memory."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.on_cpu():
        return DeviceMemory("cpu", physical)
    return described(mx.device_info(), physical, mx.metal.is_available())


def described(info: dict[str, Any], physical_bytes: int, metal: bool) -> DeviceMemory:
    """What `mx.device_info` says: on Metal of working set and buffers, on CUDA of all memory and what is free."""
    if metal:
        usable = int(info.get("max_recommended_working_set_size") or physical_bytes * 2 // 3)
        return DeviceMemory("metal", usable, int(info.get("resource_limit") or 0) or None)
    total = int(info.get("total_memory") or info.get("memory_size") or physical_bytes)
    free = int(info.get("free_memory") or total)
    return DeviceMemory("cuda", min(int(total * CUDA_SHARE), free))


def limit_mlx(budget: Budget, wired_bytes: int) -> None:
    """Have MLX keep within the ceiling. Nothing is done where there is none. Engine thread only.

    MLX frees what it caches before it exceeds the memory limit. Memory is wired only where a user has said so.

    Raises:
        ConfigError: so much memory cannot be wired.
    """
    if budget.ceiling_bytes is None or budget.cache_bytes is None:
        return
    mx.set_memory_limit(budget.ceiling_bytes)
    mx.set_cache_limit(budget.cache_bytes)
    if wired_bytes and mx.metal.is_available():
        try:
            mx.set_wired_limit(wired_bytes)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"wired_bytes = {wired_bytes} cannot be wired: {error}. Set it to at most "
                "iogpu.wired_limit_mb, or leave it out."
            ) from error
