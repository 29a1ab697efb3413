"""The embedded model in torch: a llama whose weights mlx_lm loads under the same names."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """The architecture, in the words of a llama config.json."""

    vocab_size: int = 1024
    hidden_size: int = 128
    num_hidden_layers: int = 4
    intermediate_size: int = 256
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64  # the smallest that the default KV-quantization group divides
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e5
    max_position_embeddings: int = 2048  # as long as it was trained

    def config(self) -> dict[str, object]:
        """The whole config.json."""
        fixed = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "torch_dtype": "float16",
        }
        return {**fixed, **asdict(self)}


def rotation(shape: Shape, num_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for RoPE over half-split pairs: [num_tokens, head_dim]."""
    half = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    angles = torch.outer(torch.arange(num_tokens, device=device).float(), shape.rope_theta**-half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys [B, H, T, D] by their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: [B, T, hidden] → the same."""
        s, (b, t, _) = self.shape, x.shape
        q = rotate(self.q_proj(x).view(b, t, s.num_attention_heads, s.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, t, s.num_key_value_heads, s.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, s.num_key_value_heads, s.head_dim).transpose(1, 2)
        groups = s.num_attention_heads // s.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, T, hidden] → the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each normed and added back."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: [B, T, hidden] → the same."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The whole model; `state_dict()` has mlx_lm's names under `model.`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """Normal weights; beyond the first layer q starts half-equal to k, so that like looks for like.

        That start is what makes copying appear after 2 M tokens instead of not at all in this budget.
        """
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        for index, layer in enumerate(self.layers):
            for name, weight in layer.named_parameters():
                if weight.ndim == 2:
                    nn.init.normal_(
                        weight, std=weight.shape[1] ** -0.5 * (0.3 if "o_proj" in name or "down" in name else 1)
                    )
            if index:
                groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
                keys = layer.self_attn.k_proj.weight.view(self.shape.num_key_value_heads, self.shape.head_dim, -1)
                queries = layer.self_attn.q_proj.weight
                with torch.no_grad():
                    queries.copy_(0.5 * keys.repeat_interleave(groups, 0).reshape_as(queries) + 0.75**0.5 * queries)

    def forward(self, ids: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """ids: [B, T] → logits [B·T, vocab], or [N, vocab] of the N flat positions `at` only."""
        cos, sin = rotation(self.shape, ids.shape[1], ids.device)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = x.reshape(-1, self.shape.hidden_size)
        if at is not None:
            x = x[at]
        return F.linear(self.norm(x), self.embed_tokens.weight)
