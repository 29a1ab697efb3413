"""What the device says of its memory, what a pass of a model takes there, and the limits that MLX keeps itself."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import mlx.core as mx

from mlx_mcp.core.memory import Budget, DeviceMemory, MemorySettings
from mlx_mcp.errors import ConfigError
from mlx_mcp.mlx_backend import device

PASS_TOKENS = 2048  # the most tokens of prompts that are computed at once
CUDA_SHARE = 7 / 8  # of a GPU's memory: the rest is for its context, its libraries, and other processes
FUSED_HEAD_DIMS = (64, 80, 128)  # other heads are attended to by way of all scores
LIVE = 2  # how many layers' temporaries exist at once: the next is computed before the last one's are freed


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


def limit_mlx(budget: Budget, settings: MemorySettings) -> None:
    """Have MLX keep within the ceiling. Nothing is done where there is none. Engine thread only.

    MLX frees what it caches before it exceeds the memory limit. Memory is wired only where a user has said so.

    Raises:
        ConfigError: so much memory cannot be wired.
    """
    if budget.ceiling_bytes is None or budget.cache_bytes is None:
        return
    mx.set_memory_limit(budget.ceiling_bytes)
    mx.set_cache_limit(budget.cache_bytes)
    if settings.wired_bytes and mx.metal.is_available():
        try:
            mx.set_wired_limit(settings.wired_bytes)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"wired_bytes = {settings.wired_bytes} cannot be wired: {error}. Set it to at most "
                "iogpu.wired_limit_mb, or leave it out."
            ) from error


def pass_bytes(config: dict[str, Any], num_tokens: int = PASS_TOKENS) -> int:
    """At most what the temporaries of a pass over so many tokens of a prompt take, from the shapes in a model's config.

    Counted are the activations of LIVE layers in single precision, the scores of one layer where no kernel is fused,
    and one row of logits.
    """
    config = {**config, **(config.get("text_config") or {})}

    def number(*names: str, default: int = 0) -> int:
        for name in names:
            with suppress(TypeError, ValueError):
                value = config.get(name)
                return int(max(value) if isinstance(value, list) else value)  # type: ignore[arg-type]
        return default

    hidden = number("hidden_size", "n_embd", "d_model", "dim", default=4096)
    inner = number("intermediate_size", "ffn_dim", "n_inner", "d_inner", default=4 * hidden)
    experts = number("num_experts_per_tok", "experts_per_token", "moe_topk", "top_k_experts")
    if experts:
        shared = number("shared_expert_intermediate_size") or number("n_shared_experts") * inner
        # What each expert returns is there once for each expert, before it is summed.
        inner = max(inner, experts * (number("moe_intermediate_size", default=inner) + hidden) + shared)
    heads = number("num_attention_heads", "n_head", default=max(1, hidden // 128))
    head_dim = number("head_dim", default=hidden // max(1, heads))
    attention = 4 * heads * head_dim
    scores = 0 if head_dim in FUSED_HEAD_DIMS else 2 * heads * number("max_position_embeddings", default=8192)
    scores = min(scores, 2 * heads * 8192)  # longer contexts are computed in smaller passes
    row = 4 * (LIVE * (4 * hidden + 3 * inner + attention)) + 2 * scores
    return num_tokens * row + 4 * number("vocab_size", default=262_144)
