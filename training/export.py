"""Writes trained weights as the folder that mlx_lm loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from training.network import Shape
from training.vocabulary import BEGIN, END, PAD, save_tokenizer


def export(weights: dict[str, torch.Tensor], tokenizer: Tokenizer, shape: Shape, folder: Path) -> None:
    """Write config, tokenizer and float16 weights into `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": w.to(torch.float16).contiguous() for name, w in sorted(weights.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n", encoding="utf-8")
    generation = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder, shape.max_position_embeddings)
