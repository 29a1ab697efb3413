"""What a pass over the tokens of a prompt takes besides weights, keys and values: counted, before a model is loaded.

tests/mlx_backend/test_pass_memory.py measures that no pass takes more, nor a fifth of it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.architectures import ALLOWED

PASS_TOKENS = 2048  # the most tokens of prompts that are computed at once
PADDED_CONTEXT = 8192  # to which passes of others than our own attention are counted; those have a chunk each
SCORE_BYTES = 8  # a score and its weight in single precision
LIVE = 2  # how many layers' temporaries exist at once: the next is computed before the last one's are freed


def pass_bytes(config: dict[str, Any], num_tokens: int = PASS_TOKENS, kv_bits: int | None = None) -> int:
    """At most what the temporaries of a pass over so many tokens of a prompt take, from the shapes in a model's config.

    Counted are the activations of LIVE layers in single precision, the scores of one layer where no kernel is fused,
    and one row of logits. `kv_bits` is what keys and values are stored in.
    """
    kind = config.get("model_type", "")
    config = {**config, **(config.get("text_config") or {})}
    hidden = number(config, "hidden_size", "n_embd", "d_model", "dim", default=4096)
    inner = number(config, "intermediate_size", "ffn_dim", "n_inner", "d_inner", default=4 * hidden)
    experts = number(config, "num_experts_per_tok", "experts_per_token", "moe_topk", "top_k_experts")
    if experts:
        shared = number(config, "shared_expert_intermediate_size") or number(config, "n_shared_experts") * inner
        # What each expert returns is there once for each expert, before it is summed.
        inner = max(inner, experts * (number(config, "moe_intermediate_size", default=inner) + hidden) + shared)
    heads = number(config, "num_attention_heads", "n_head", default=max(1, hidden // 128))
    head_dim = number(config, "head_dim", default=hidden // max(1, heads))
    context = number(config, "max_position_embeddings", default=PADDED_CONTEXT)
    scores = num_tokens * heads * min(context, PADDED_CONTEXT)
    if MODEL_REMAPPING.get(kind, kind) in ALLOWED:  # runs on our own attention
        kept = device.keeps_scores(head_dim, kv_bits is not None)
        scores = min(num_tokens * heads * context, max(device.MAX_SCORES, heads * context)) if kept else 0
    row = 4 * LIVE * (4 * hidden + 3 * inner + 4 * heads * head_dim)
    return num_tokens * row + SCORE_BYTES * scores + 4 * number(config, "vocab_size", default=262_144)


def number(config: dict[str, Any], *names: str, default: int = 0) -> int:
    """The first of these numbers that a config has; the largest of those that differ by layer."""
    for name in names:
        with suppress(TypeError, ValueError):
            value = config.get(name)
            return int(max(value) if isinstance(value, list) else value)  # type: ignore[arg-type]
    return default
