"""Which of mlx-lm's model files run which way (architectures.py), and the proof that each gives right answers.

Every file is run on a tiny random model: rows of mixed lengths that join and leave at different steps, some far past a
window of 24 tokens. Each row's logits must be bit by bit those of the row alone, and those of mlx-lm's own caches.
"""

import importlib

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.core.slots import Ledger, SlotPool
from mlx_mcp.errors import ModelError
from mlx_mcp.mlx_backend import architectures
from mlx_mcp.mlx_backend import runner as runner_module
from mlx_mcp.mlx_backend.architectures import ALLOWED, ALONE
from mlx_mcp.mlx_backend.cache_tree import leaves, regroup
from mlx_mcp.mlx_backend.head import Head
from mlx_mcp.mlx_backend.padded_rows import PaddedRows
from mlx_mcp.mlx_backend.rows import SoloRows
from mlx_mcp.mlx_backend.runner import Runner
from mlx_mcp.mlx_backend.slotted_rows import SlottedRows
from tests.comparing import assert_same, assert_same_answer
from tests.effort import THOROUGH, rare_ones_slow
from tests.models_made import initial

pytestmark = pytest.mark.usefixtures("kernels")
LIMITS = Limits(chunk_tokens=16, prefill_tokens_idle=32, prefill_tokens_busy=16)
# prompt tokens, max_tokens, step at which it joins: slots of two sizes, rows before, at and after the window's end
SHORT_ROWS = [(3, 6, 0), (125, 5, 0), (21, 5, 2), (33, 3, 4)]
ROWS = [(3, 20, 0), (120, 14, 0), (16, 20, 0), (33, 12, 9), (1, 20, 14)] if THOROUGH else SHORT_ROWS

# What most model files call things; they take what they know.
COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "hidden_act": "silu",
    "sliding_window": 24,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.0,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # recurrent layers
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "n_groups": 1,
    # GPT-2 and its kin
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 512,
    "n_ctx": 512,
    "n_inner": 96,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}}
SCALED_ROPE = {"rope_parameters": {**PLAIN_ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32}}
LONG_ROPE = {"type": "longrope", "long_factor": 1.5, "short_factor": 1.0, "original_max_position_embeddings": 256}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7}
DYNAMIC = {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0, "alpha": 2.0}
WIDE_KV = {"num_key_value_heads": 4}
GEMMA3 = {"num_hidden_layers": 3, "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window_pattern": 3}
GEMMA4 = {"num_hidden_layers": 4, "layer_types": MIXED["layer_types"] * 2, "global_head_dim": 32}
SHARING = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}
GRANITE = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
}
KIMI = {
    "linear_attn_config": {
        "full_attn_layers": [2],
        "kda_layers": [1],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
    "model_max_length": 512,
    "num_experts_per_token": 2,
}
LFM2 = {
    "block_dim": 64,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", "full_attention"],
}
LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 96,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 2,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
MINICPM = {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2}
QWEN3_5 = {"full_attention_interval": 2, "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5}}


def text(**config):
    """For the files whose language model is one part of a larger one."""
    return {"text_config": config}


# Case → what its config has beside COMMON; the first word names the model file.
SLOTTED = {
    "Klear": {},
    "afmoe": {**MIXED, "num_dense_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_moe": {},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 4},
    "cohere": {},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": {},
    "deepseek_v2": {**WIDE_KV, "rope_scaling": YARN},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "exaone": {"num_layers": 2},
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": None},
    "exaone_moe": {**MIXED, "is_moe_layer": [False, True]},
    "exaone_moe without windows": {"layer_types": ["full_attention"] * 2, "is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 16},
    "gemma": {},
    "gemma3": text(**GEMMA3),
    "gemma3_text": GEMMA3,
    "gemma3n": text(
        **{**GEMMA4, **SHARING, "intermediate_size": [96] * 4},
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        altup_num_inputs=2,
        altup_active_idx=0,
        altup_correct_scale=True,
        altup_coef_clip=120.0,
        laurel_rank=8,
        rope_local_base_freq=10000.0,
        final_logit_softcapping=30.0,
    ),
    "gemma4": text(
        **GEMMA4,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    ),
    "gemma4_text": {**GEMMA4, **SHARING},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"rope_scaling": None, "use_qk_norm": True},
    "gpt2": {},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gpt_oss": MIXED,
    "gptj": {"rotary_dim": 8},
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "granitemoehybrid": {
        **GRANITE,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "helium": {},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": DYNAMIC,
    },
    "hunyuan_v1_dense": {"rope_scaling": DYNAMIC},
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {"loop_window_size": 24},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
    "laguna": {**MIXED, **ROPES, "num_attention_heads_per_layer": [4, 4], "mlp_layer_types": ["dense", "sparse"]},
    "lfm2": LFM2,
    "lfm2-vl": text(**LFM2),
    "lfm2_moe": {"use_expert_bias": True, "num_dense_layers": 1, "layer_types": LFM2["layer_types"]},
    "lille-130m": {"block_size": 512, "n_kv_heads": 2},
    "llama": MIXED,
    "llama4_text": {"no_rope_layers": [1, 0], "use_qk_norm": True},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 16,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": "auto",
    },
    "mellum": {**MIXED, **ROPES},
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 24,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
        "v_head_dim": 8,
    },
    "minicpm": MINICPM,
    "minicpm3": {**MINICPM, **WIDE_KV, "rope_scaling": LONG_ROPE},
    "minimax": {"rotary_dim": 8},
    "ministral3": {**MIXED, **SCALED_ROPE},
    "mistral3": text(**SCALED_ROPE, model_type="ministral3"),
    "mistral3 with windows in layers that keep every token": text(**MIXED, model_type="mistral"),
    "mixtral": {},
    "muse_glimmer": MIXED,
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
        ],
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "hybrid_override_pattern": "M*-E",
        "moe_shared_expert_intermediate_size": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
    },
    "olmo2": {},
    "olmo3": MIXED,
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_allow_neg_eigval": True,
        "linear_num_key_heads": 4,
    },
    "olmoe": {},
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.5],
    },
    "phi": {},
    "phi3": {"rope_scaling": LONG_ROPE},
    "phimoe": {"rope_scaling": {**LONG_ROPE, "long_mscale": 1.2, "short_mscale": 1.2}},
    "phixtral": {"num_vocab": 300, "model_dim": 64, "num_heads": 4, "num_layers": 2, "rotary_dim": 8},
    "pixtral": text(),
    "plamo3": {"sliding_window_pattern": 2, "window_size": 24},
    "qwen": {"kv_channels": 16},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": text(),
    "qwen3": {},
    "qwen3_5": text(**QWEN3_5, num_experts=0),
    "qwen3_5_moe": text(**QWEN3_5),
    "qwen3_moe": {},
    "qwen3_next": {"full_attention_interval": 2},
    "qwen3_vl": text(),
    "qwen3_vl_moe": text(),
    "recurrent_gemma": {
        "num_key_value_heads": 1,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 24,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": {},  # its model is glm4_moe's
    "spark2_5": {**MIXED, **ROPES, "hidden_act": "gelu"},
    "starcoder2": {},
    "step3p5": {
        **MIXED,
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
        "moe_layers_enum": "1",
    },
    "talkie": {},
    "telechat3": {},
    "youtu_llm": WIDE_KV,
}
# They work on the keys and values that the cache returns. Latent attention, unless it is named otherwise.
PADDED = {
    "bailing_hybrid": {**WIDE_KV, "layer_group_size": 2, "group_norm_size": 4},
    "bailing_moe_v3": {"layer_group_size": 2},
    "deepseek_v3": WIDE_KV,
    "deepseek_v32": {**WIDE_KV, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 24},  # chooses among its keys
    "gear": {  # may cap its scores
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "conv_mixer"],
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
    },
    "glm4_moe_lite": WIDE_KV,
    "glm_moe_dsa": {
        **WIDE_KV,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 24,
        "rope_parameters": PLAIN_ROPE,
    },
    "kimi_k25": text(**WIDE_KV),
    "kimi_k3": text(
        **KIMI,
        hidden_act="situ",
        num_shared_experts=0,
        attn_res_block_size=1,
        activation_situ_beta=1.0,
        activation_situ_linear_beta=1.0,
    ),
    "kimi_linear": KIMI,
    "kimi_vl": text(**WIDE_KV),
    "longcat_flash": LONGCAT,
    "mistral3 around mistral4": text(**WIDE_KV, **SCALED_ROPE, model_type="mistral4"),
    "mistral4": {**WIDE_KV, **SCALED_ROPE},
    "plamo": {"n_shared_head": 2},  # repeats its keys
    "plamo2": {  # calls MLX's attention itself
        "hidden_size_per_head": 16,
        "full_attention_idx": [1],
        "mamba_d_state": 16,
        "mamba_num_heads": 4,
        "mamba_step": 2,
    },
    "stablelm": {"use_qkv_bias": True},  # brings its keys to float32
}
# gear's ring lies otherwise in memory than a row's own; where keys are chosen, a padded row sums them in another order.
BOUNDS = {"gear": 1e-4, "deepseek_v32": 1e-4, "glm_moe_dsa": 1e-4}
SOLO = {
    # tells positions from the number of keys, padding included
    "afm7": {"hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    # takes a mask of rows for one of heads
    "gemma2": {},
    # its positions are Python numbers
    "gpt_bigcode": {},
    # keeps the tokens before, as many as there are
    "longcat_flash_ngram": {**LONGCAT, "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2},
    # chooses keys by blocks of places, padding included
    "minimax_m3_vl": text(
        dense_intermediate_size=96,
        layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "sparse"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=8,
        index_topk_blocks=2,
    ),
    # its caches are its own
    "deepseek_v41": {
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_ratios": [0, 4],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 8,
        "hc_mult": 2,
        "scoring_func": "sqrtsoftplus",
    },
    # its caches come in chunks
    "llama4": text(
        num_hidden_layers=4,
        attention_chunk_size=24,
        interleave_moe_layer_step=2,
        num_experts_per_tok=1,
        rope_scaling=None,
        use_qk_norm=True,
    ),
    # frequencies that go by one sequence's length, whatever the model file
    "llama with dynamic rope": {"rope_scaling": DYNAMIC, "max_position_embeddings": 32},
    "internlm3 with dynamic rope": {"rope_scaling": DYNAMIC, "max_position_embeddings": 32},
}
UNPROVED = {
    "bitnet": "its linear layers have no CPU form",
    "muse_spark": "its layers have no CPU form",
    "olmo": "needs a package of its own, and cannot take a prompt with a cache",
    "phi3small": "mlx-lm's own gives logits that are not numbers, or ends the process; padding would be seen as tokens",
    "prism_hadamard_qwen35": "a format of weights around qwen3_5",
}
CASES = SLOTTED | PADDED | SOLO
WAYS = {SlottedRows: SLOTTED, PaddedRows: PADDED, SoloRows: SOLO}


def module(name):
    return importlib.import_module("mlx_lm.models." + name.split()[0])


def build(name, **changes):
    """A tiny random model of a case, with `changes` in its config where the config knows them."""
    config = CASES[name]
    nested = "text_config" in config
    own = config["text_config"] if nested else config
    full = {"model_type": name.split()[0]} | COMMON | own | changes
    outer = {"model_type": name.split()[0], "vocab_size": COMMON["vocab_size"]}
    config = outer | {"text_config": full} if nested else full
    mx.random.seed(7)
    model = module(name).Model(module(name).ModelArgs.from_dict(config))
    weights = [(path, initial(path, array)) for path, array in tree_flatten(model.parameters())]
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


def sequences(rows):
    return [
        Sequence(i, tuple((31 * i + 7 * k * k + 13 * k) % 300 for k in range(n)), SamplingParams(most), frozenset())
        for i, (n, most, _) in enumerate(rows)
    ]


@pytest.fixture
def run(monkeypatch):
    """Run (sequence, step at which it joins) together; returns the logits of every token by sequence id and number."""
    seen, original = {}, runner_module.draw

    def draw(logits, rows, *rest):
        for row, its_logits in zip(rows, logits, strict=True):
            seen[tuple(row.prompt_ids), row.index] = its_logits
        return original(logits, rows, *rest)

    monkeypatch.setattr(runner_module, "draw", draw)

    def run(runner, joining, limits=LIMITS):
        scheduler = Scheduler(limits, SlotPool(Ledger(1 << 40), runner.cost))
        joining, step_number = list(joining), 0
        seen.clear()
        while joining or scheduler.has_work:
            while joining and (joining[0][1] <= step_number or not scheduler.has_work):
                scheduler.add(joining.pop(0)[0])
            step = scheduler.schedule()
            result = runner.launch(step).collect()
            assert not result.failed
            assert runner.kv_bytes <= scheduler.pool.ledger.used_bytes, "more than was reserved"
            running = {s.sequence_id: s for s in scheduler.running}
            for sequence_id in scheduler.commit(step, result.tokens):
                scheduler.remove(running[sequence_id])
                runner.release(sequence_id)
            step_number += 1
        assert runner.num_rows == runner.kv_bytes == 0
        return {key: np.array(logits) for key, logits in seen.items()}

    return run


def plain(model, caches, s):
    """What mlx-lm's own caches make of a sequence, in the same chunks: its logits and tokens."""
    logits, tokens = {}, []
    for start in range(0, len(s.prompt_ids), LIMITS.chunk_tokens):
        out = model(mx.array([s.prompt_ids[start : start + LIMITS.chunk_tokens]]), cache=caches)
    while True:
        logits[s.prompt_ids, len(tokens)] = np.array(out[0, -1].astype(mx.float32))
        tokens.append(int(np.argmax(logits[s.prompt_ids, len(tokens)])))
        if len(tokens) == s.params.max_tokens:
            return logits, tokens
        out = model(mx.array([tokens[-1:]]), cache=caches)


def assert_close(found, expected, bound):
    for key in expected:
        assert_same(found[key], expected[key], bound, f"prompt of {len(key[0])}, token {key[1]}")


def assert_same_row(s, found, tokens, logits, bound):
    expected = [logits[s.prompt_ids, i] for i in range(len(tokens))]
    for i in range(assert_same_answer(s.output_ids, tokens, expected, bound)):
        assert_same(found[s.prompt_ids, i], expected[i], bound, f"prompt of {len(s.prompt_ids)}, token {i}")


def assert_right(model, runner, run, rows=ROWS, bound=0.0, caches=make_prompt_cache, limits=LIMITS):
    """Every row among the others is what it is alone and, unless None are given, what mlx-lm's `caches` make of it."""
    together = sequences(rows)
    found = run(runner, zip(together, (step for _, _, step in rows), strict=True), limits)
    assert len(found) == sum(most for _, most, _ in rows)
    for s, alone in zip(together, sequences(rows), strict=True):
        logits = run(runner, [(alone, 0)])
        assert_same_row(s, found, alone.output_ids, logits, bound)
        if caches is not None:
            logits, tokens = plain(model, caches(model), alone)
            assert_same_row(s, found, tokens, logits, bound)


# `make test` looks at each way a row's keys can be kept, `make test-long` at what most people run too, and
# `make test-all` at every architecture.
FEWEST = set(
    "llama qwen3 qwen3_moe qwen3_next gemma3_text gemma4_text mistral3 phi3 gpt_oss deepseek_v3 glm4_moe cohere2 lfm2 "
    "falcon_h1 nemotron_h mimo_v2_flash mamba2 stablelm recurrent_gemma".split()
)
USUAL = FEWEST | set(
    "qwen2 gemma2 ministral3 mixtral phimoe glm4 olmo2 smollm3 granite minicpm3 afm7 plamo talkie bailing_moe ernie4_5 "
    "hunyuan exaone4 seed_oss".split()
)


@pytest.mark.parametrize("name", rare_ones_slow(CASES, USUAL, FEWEST))
def test_every_row_is_what_it_is_alone_and_what_mlx_lm_makes_of_it(name, run):
    model = build(name)
    runner = Runner(model)
    assert name in WAYS[type(runner.rows)]
    assert_right(model, runner, run, bound=BOUNDS.get(name, 0.0))


# The output of talkie is an array.
@pytest.mark.parametrize("name", rare_ones_slow((n for n in SLOTTED if n != "talkie"), USUAL, FEWEST))
def test_of_a_prompts_end_the_last_token_of_each_row_alone_gets_logits(name):
    model = build(name)
    whole = model(mx.array([[5, 6, 7], [8, 9, 0]]), cache=make_prompt_cache(model))
    Head(model, cut=True).asked.sizes = [3, 2]
    cut = model(mx.array([[5, 6, 7], [8, 9, 0]]), cache=make_prompt_cache(model))
    assert cut.shape == (2, 1, whole.shape[2])
    assert_same(cut[:, 0], mx.stack([whole[0, 2], whole[1, 1]]))


def test_a_part_of_the_last_layer_that_an_earlier_one_shares_is_given_every_token():
    model = build("llama")
    model.layers[-1].mlp = model.layers[0].mlp
    whole = model(mx.array([[5, 6, 7]]), cache=make_prompt_cache(model))
    Head(model, cut=True).asked.sizes = [3]
    cut = model(mx.array([[5, 6, 7]]), cache=make_prompt_cache(model))
    assert_same(cut[:, 0], whole[:, 2])


@pytest.mark.parametrize("name", rare_ones_slow(SLOTTED, USUAL, FEWEST))
def test_the_ends_of_prompts_read_in_one_pass_are_what_they_are_alone(name, run, monkeypatch):
    model = build(name)
    runner = Runner(model)
    passes = []
    original = runner.rows.passes
    monkeypatch.setattr(runner.rows, "passes", lambda chunks: passes.append(original(chunks)) or passes[-1])
    limits = Limits(chunk_tokens=16, prefill_tokens_idle=256, prefill_tokens_busy=256)
    rows = [(n, 3, 0) for n in ((5, 9, 16, 35, 1, 44, 60) if THOROUGH else (5, 16, 35, 1))]
    assert_right(model, runner, run, rows, BOUNDS.get(name, 0.0), limits=limits)
    assert max(len(some) for step in passes for some in step) == (1 if runner.rows.by_row else len(rows))


def test_the_lists_hold_what_is_proved_here_and_no_more():
    def files(cases):
        return {module(name).Model.__module__.rpartition(".")[2] for name in cases}

    assert files(SLOTTED) == ALLOWED
    by_themselves = {"deepseek_v41", "llama4"} | files(name for name in SOLO if "dynamic" in name)
    assert files(SOLO) - by_themselves == ALONE - set(UNPROVED)
    assert not ALLOWED & set(UNPROVED)


def test_an_architecture_outside_the_list_goes_another_way_and_answers_right(run, monkeypatch):
    model = build("qwen3")
    monkeypatch.setattr(architectures, "ALLOWED", ALLOWED - {"qwen3"})
    runner = Runner(model)
    assert type(runner.rows) is PaddedRows
    assert_right(model, runner, run)


@pytest.mark.parametrize("name", ["afm7", "deepseek_v3", "gemma2", "plamo", "stablelm"])
def test_a_model_that_looks_into_its_keys_fails_where_it_would_answer_wrongly(name, run, monkeypatch):
    monkeypatch.setattr(architectures, "ALLOWED", ALLOWED | {name})
    monkeypatch.setattr(architectures, "ALONE", frozenset())
    runner = Runner(build(name))
    assert type(runner.rows) is SlottedRows
    with pytest.raises((AttributeError, TypeError)):
        run(runner, [(s, 0) for s in sequences(ROWS)])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_so_many_rows_that_tokens_are_sorted_by_expert_change_nothing(name, run):
    model = build(name, num_experts=8, num_local_experts=8, num_experts_per_tok=4)
    assert_right(model, Runner(model), run, rows=[(3 + i % 5, 4, 0) for i in range(16)])  # 64 indices


# Quantized keys and values

WIDE = {"hidden_size": 128, "head_dim": 32, "v_head_dim": 32, "swa_head_dim": 32, "swa_v_head_dim": 32}
FEW = [(3, 12, 0), (60, 9, 0), (16, 12, 0), (33, 8, 6)] if THOROUGH else [(3, 4, 0), (60, 3, 0), (22, 4, 1)]
QUANTIZED = "llama gemma3_text falcon_h1 qwen3_next mimo_v2_flash minicpm3 mistral3".split()


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_rows_are_what_they_are_alone_and_what_mlx_lm_makes_of_them(name, kv_bits, run):
    model = build(name, **WIDE, qk_nope_head_dim=24)
    runner = Runner(model, kv_bits)

    def caches(model):
        template, layers = make_prompt_cache(model), runner.rows.layers
        kept = [layer.kv_bits for layer in layers.values()]
        quantized = iter([QuantizedKVCache(bits.group_size, bits.bits) for bits in kept])
        return regroup(template, [next(quantized) if type(c) is KVCache else c for c in leaves(template)])

    assert_right(model, runner, run, rows=FEW, caches=caches)


@pytest.mark.parametrize("name", ["gemma4_text", "iquestloopcoder"])
def test_layers_that_share_quantized_keys_stay_near_what_they_are_unquantized(name, run):
    """mlx-lm itself cannot share them. iquestloopcoder attends twice with the same queries."""
    model = build(name, **WIDE, global_head_dim=64)
    quantized = Runner(model, 8)
    assert_right(model, quantized, run, rows=FEW, caches=None)
    rows = [(40, 2, 0), (9, 2, 0)]
    found = run(quantized, [(s, 0) for s in sequences(rows)])
    assert_close(found, run(Runner(model), [(s, 0) for s in sequences(rows)]), 0.2)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("llama", {}, "a multiple of 32 wide; here they are 16"),
        ("mimo_v2_flash", WIDE | {"v_head_dim": 24}, "here they are 24 and 32"),
        ("gpt_oss", WIDE, "mlx-lm says: .*sinks"),
        ("mamba2", {}, "No layer keeps"),
        ("recurrent_gemma", WIDE, "No layer keeps"),
        ("deepseek_v3", WIDE, "'deepseek_v3' reads them itself"),
        ("mistral3 around mistral4", WIDE, "'mistral3' reads them itself"),
        ("gemma2", WIDE, "'gemma2' reads them itself"),
    ],
)
def test_what_cannot_be_quantized_is_refused_at_load_with_the_next_step(name, changes, why):
    model = build(name, **changes)
    with pytest.raises(ModelError, match=rf"{why}.*Start the server without kv_bits, or choose another model"):
        Runner(model, 8)
