"""What devices say of their memory, and what passes take there."""

import mlx.core as mx
import pytest

from mlx_mcp.core.memory import Budget, MemorySettings
from mlx_mcp.errors import ConfigError
from mlx_mcp.mlx_backend.device_memory import described, limit_mlx, pass_bytes

GB = 10**9
M4_MAX = {
    "architecture": "applegpu_g16s",
    "max_recommended_working_set_size": 115_448_725_504,
    "memory_size": 137_438_953_472,
    "resource_limit": 499_000,
    "max_buffer_length": 86_586_540_032,
}


def test_metal_says_what_it_recommends_and_how_many_buffers_there_may_be():
    found = described(M4_MAX, 0, metal=True)
    assert (found.backend, found.usable_bytes, found.max_buffers) == ("metal", 115_448_725_504, 499_000)
    assert described({}, 9 * GB, metal=True).usable_bytes == 6 * GB


def test_on_cuda_what_other_processes_hold_is_not_counted_on():
    assert described({"total_memory": 80 * GB, "free_memory": 79 * GB}, 0, metal=False).usable_bytes == 70 * GB
    assert described({"total_memory": 80 * GB, "free_memory": 20 * GB}, 0, metal=False).usable_bytes == 20 * GB


def test_mlx_is_given_the_ceiling_and_its_cache_and_nothing_is_wired(monkeypatch):
    told = {}
    for name in ("set_memory_limit", "set_cache_limit", "set_wired_limit"):
        monkeypatch.setattr(mx, name, lambda limit, name=name: told.update({name: limit}))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    limit_mlx(Budget(5, None), MemorySettings())
    assert told == {}
    limit_mlx(Budget(5, None, 9, 2), MemorySettings())
    assert told == {"set_memory_limit": 9, "set_cache_limit": 2}
    limit_mlx(Budget(5, None, 9, 2), MemorySettings(wired_bytes=7))
    assert told["set_wired_limit"] == 7


def test_more_than_can_be_wired_is_refused_with_the_systems_own_limit(monkeypatch):
    def refuse(limit):
        raise ValueError("larger than the system's")

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    for name in ("set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda limit: 0)
    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with pytest.raises(ConfigError, match=r"cannot be wired.*iogpu\.wired_limit_mb"):
        limit_mlx(Budget(5, None, 9, 2), MemorySettings(wired_bytes=7))


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "vocab_size": 128_256,
    "head_dim": 128,
}


def test_a_pass_takes_more_where_attention_is_not_fused_or_experts_are_many():
    plain = pass_bytes(LLAMA_8B)
    assert 0.5 * GB < plain < 2 * GB
    assert pass_bytes(LLAMA_8B | {"head_dim": 256}) > plain
    assert pass_bytes(LLAMA_8B | {"num_experts_per_tok": 8, "moe_intermediate_size": 4096}) > plain
    assert pass_bytes({"text_config": LLAMA_8B}) == plain
    assert pass_bytes(LLAMA_8B, 128) < plain / 8


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe"])
def test_no_pass_takes_more_than_was_counted(kind):
    import importlib

    from mlx.utils import tree_map

    tokens, small = 512, {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 256}
    config = small | {
        "model_type": kind,
        "intermediate_size": 512,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
    }
    if kind == "qwen3_moe":
        config |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        }
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda p: p.astype(mx.float32), model.parameters()))
    mx.eval(model.parameters())
    inner = getattr(model, "model", model)
    mx.eval(inner(mx.zeros((1, tokens), mx.int32)))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(inner(mx.zeros((1, tokens), mx.int32)))
    assert 0 < mx.get_peak_memory() - before <= pass_bytes(config, tokens)
