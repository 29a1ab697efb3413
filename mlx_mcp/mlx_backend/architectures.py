"""Says which of mlx-lm's model files can run in which way, and whether their keys and values can be reused."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from mlx_mcp.mlx_backend.cache_tree import leaves
from mlx_mcp.mlx_backend.hook import model_modules

# Model files of mlx-lm that touch keys and values through their cache and `scaled_dot_product_attention` alone.
# tests/mlx_backend/test_architectures.py proves each of them, here and in ALONE.
ALLOWED = frozenset(
    """
    Klear afmoe apertus baichuan_m1 bailing_moe bailing_moe_linear cohere cohere2 dbrx deepseek deepseek_v2 dots1
    ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 gemma gemma3 gemma3_text gemma3n gemma4 gemma4_text glm
    glm4 glm4_moe gpt2 gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense
    internlm2 internlm3 iquestloopcoder jamba laguna lfm2 lfm2-vl lfm2_moe lille-130m llama llama4_text mamba mamba2
    mellum mimo mimo_v2_flash minicpm minicpm3 minimax ministral3 mistral3 mixtral muse_glimmer nanbeige nanochat
    nemotron nemotron-nas nemotron_h olmo2 olmo3 olmo_hybrid olmoe openelm phi phi3 phimoe phixtral pixtral plamo3 qwen
    qwen2 qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma rwkv7
    seed_oss smollm3 spark2_5 starcoder2 step3p5 talkie telechat3 youtu_llm
    """.split()
)
# Model files that fail or, worse, answer wrongly when the rows of a batch are padded to one length.
ALONE = frozenset("afm7 gemma2 gpt_bigcode longcat_flash_ngram minimax_m3_vl phi3small".split())


def architecture(model: Any) -> str:
    """The name of the model's file in mlx-lm."""
    return type(model).__module__.rpartition(".")[2]


def is_allowed(model: Any) -> bool:
    """Whether all model files that it consists of are proved to run on our own attention."""
    return model_files(model) <= ALLOWED


def must_run_alone(model: Any) -> bool:
    """Whether each of its rows must go through the model by itself."""
    return depends_on_length(model) or bool(model_files(model) & ALONE)


def model_files(model: Any) -> set[str]:
    """The names of the model files that it consists of."""
    return {module.__name__.rpartition(".")[2] for module in model_modules(model) if hasattr(module, "Model")}


def depends_on_length(model: Any) -> bool:
    """Whether the frequencies of its positions depend on the length of the one sequence that it takes."""
    return any(type(module).__name__ == "DynamicNTKScalingRoPE" for module in model.modules())


def reuse_refusal(model: Any, caches: list[Any]) -> str:
    """Why keys and values of this model cannot be reused, empty if they can; uses up the caches, computes nothing."""
    others = {type(leaf).__name__ for leaf in leaves(caches)} - {"KVCache", "RotatingKVCache", "ArraysCache"}
    if others:
        return f"Its layers keep what cannot be cut ({', '.join(sorted(others))})."
    if depends_on_length(model):
        return "Its keys depend on how long the prompt is."
    states: list[Any] = [leaf for leaf in leaves(caches) if type(leaf) is ArraysCache]
    before = [[x.shape for x in leaf.cache] for leaf in states]
    model(mx.array([[0, 0]]), cache=caches)
    if [[x.shape for x in leaf.cache] for leaf in states] != before:
        return "Its states grow."
    return ""
