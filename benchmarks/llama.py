"""The llama that the benchmarks serve, and texts for it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from engine import MODEL_25M  # and with it the root of this tree on the path, for the import of tests below
from transformers import PreTrainedTokenizerFast

from tests.models_made import make_model

CONTEXT_TOKENS = 131_072
MODEL_5M = MODEL_25M | {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Messages = list[tuple[str, str]]  # role, text


def make_folder(folder: Path, short: bool, of: dict[str, Any] = MODEL_25M) -> tuple[Path, int]:
    """Write the model; returns its folder and the bytes that it keeps of a token.

    It answers in letters only: such an answer reads as the same token when it is sent again, as a real one's would.
    """
    size = {} if short else {key: value for key, value in of.items() if key != "vocab_size"}
    make_model(folder, max_position_embeddings=CONTEXT_TOKENS, **size)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    letters = [token_id for token, token_id in vocabulary.items() if re.fullmatch("[a-z]", token)]
    path = str(folder / "model.safetensors")
    weights: Any = mx.load(path)
    head = mx.zeros_like(weights["lm_head.weight"])
    head[mx.array(letters)] = weights["lm_head.weight"][mx.array(letters)]
    weights["lm_head.weight"] = head
    mx.eval(weights)
    mx.save_safetensors(path, weights, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    per_layer = 2 * config["num_key_value_heads"] * config["head_dim"] * mx.float32.size
    print(f"a llama of {sum(array.size for array in weights.values()) / 1e6:.1f}M parameters, float32", end=", ")
    return folder, config["num_hidden_layers"] * per_layer


class Texts:
    """New texts of any number of tokens, and the tokens that the model's template makes of them."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, model_max_length=CONTEXT_TOKENS)
        tokens = (token.removeprefix("Ġ") for token in self.tokenizer.get_vocab() if token.startswith("Ġ"))
        self.words = sorted(word for word in tokens if word.isalpha() and self.count(f" {word}") == 1)

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def text(self, num_tokens: int) -> str:
        """Random words; after the first, which has no space before it, each is one token."""
        words = random.choices(self.words, k=num_tokens)
        while self.count(" ".join(words)) > num_tokens:
            words.pop()
        return " ".join(words)

    def tokens(self, messages: Messages) -> list[int]:
        """What the model reads."""
        chat = [{"role": role, "content": text} for role, text in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def alike(self, messages: Messages) -> Messages:
        """A new system prompt and a new prompt that make as many tokens as `messages`."""
        system = self.text(self.count(messages[0][1]))
        rest = len(self.tokens(messages)) - len(self.tokens([("system", system), ("user", "")]))
        return [("system", system), ("user", self.text(rest))]
