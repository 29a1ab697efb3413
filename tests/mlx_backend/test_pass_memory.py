"""What is counted for a pass, and what passes take: measured with the ways of a GPU on this machine's CPU."""

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.slots import Ledger, SlotPool
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend.pass_memory import SCORE_BYTES, pass_bytes
from mlx_mcp.mlx_backend.runner import Runner
from tests.mlx_backend.test_runner import sequence
from tests.models_made import make_model

GB = 10**9
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "vocab_size": 128_256,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
}


def test_a_pass_takes_more_where_attention_is_not_fused_or_experts_are_many():
    plain = pass_bytes(LLAMA_8B)
    assert 0.5 * GB < plain < 2 * GB
    scores = SCORE_BYTES * device.MAX_SCORES
    assert pass_bytes(LLAMA_8B, kv_bits=8) == plain + scores
    assert pass_bytes(LLAMA_8B | {"head_dim": 96}) < plain + scores
    assert pass_bytes(LLAMA_8B | {"head_dim": 256}) > plain + scores
    assert pass_bytes(LLAMA_8B | {"num_experts_per_tok": 8, "moe_intermediate_size": 4096}) > plain
    assert pass_bytes(LLAMA_8B | {"text_config": LLAMA_8B | {"model_type": "llama_text"}}) == plain
    assert pass_bytes(LLAMA_8B, 128) < plain / 8
    its_own = pass_bytes(LLAMA_8B | {"model_type": "deepseek_v3"})  # whose attention is not ours, so it has no parts
    assert its_own == plain + SCORE_BYTES * 2048 * 32 * 8192


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
ARCHITECTURES = {
    "llama": ("llama", SMALL, None),
    "llama, 8 bits": ("llama", SMALL, 8),
    "gemma3": ("gemma3", SMALL | {"query_pre_attn_scalar": 32}, None),
    "qwen3_moe": ("llama", SMALL | MOE, None),
}
PASS, AT_MOST = 128, 7  # tokens; times of what a pass takes if each operation waits for the one before


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_pass_takes_more_than_was_counted_and_not_much_less(tmp_path, monkeypatch, name):
    """Nor does it take more at the end of a long prompt than at its beginning."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "MAX_SCORES", 4 * PASS * 64)
    architecture, changes, kv_bits = ARCHITECTURES[name]
    folder = make_model(tmp_path, architecture, **changes)
    model, config = load_model(folder)
    counted = pass_bytes(config, PASS, kv_bits)
    mx.eval(model.parameters())
    freely = peaks(model, kv_bits)
    limit = mx.set_memory_limit(1)  # over it MLX waits before each operation for those under way
    try:
        one_by_one = peaks(model, kv_bits)
    finally:
        mx.set_memory_limit(limit)
    assert max(freely) <= counted <= AT_MOST * max(one_by_one)
    assert one_by_one[-1] <= 1.2 * one_by_one[1]


def peaks(model, kv_bits):
    """What each pass of a long prompt takes at most besides weights, keys and values."""
    weights = mx.get_active_memory()
    runner, found = Runner(model, kv_bits, PASS), []
    scheduler = Scheduler(Limits(1, 1, PASS, PASS, PASS), SlotPool(Ledger(1 << 40), runner.cost))
    scheduler.add(sequence(0, 4 * PASS - 40))
    while not scheduler.running or not scheduler.running[0].decoding:
        mx.clear_cache()
        mx.reset_peak_memory()
        step = scheduler.schedule()
        result = runner.launch(step).collect()
        mx.synchronize()
        found.append(mx.get_peak_memory() - weights - runner.kv_bytes)
        scheduler.commit(step, result.tokens)
    return found
