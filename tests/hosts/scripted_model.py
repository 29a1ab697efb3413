"""A model with a script in its weights, and real keys and values: what it says next depends on its last token alone.

Its layers add nothing to a token's embedding, and its output layer leads from each token of the script to the next. Its
chat template ends a prompt with the token that begins the right line of the script, and shows answers as they were.
"""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import AddedToken, Tokenizer

from mlx_mcp.models.registry import EMBEDDED_FOLDER

CONTEXT_TOKENS = 262_144  # Claude Code summarises a conversation long before that
SIZE = 64
CALL_WORD = "look it up"  # a user's message with these words is answered by the call
SAY, CALL = "<|say|>", "<|call|>"
WORDS = "Understood."
TEMPLATE = (
    "<|begin|>{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{{ '<|call|>' if m.tool_calls else '<|say|>' }}{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    f"{{{{ '<|call|>' if messages[-1].role == 'user' and '{CALL_WORD}' in messages[-1].content else '<|say|>' }}}}"
    "{% endif %}"
)


def make_scripted(folder: Path, tool: str, argument: str, value: str) -> Path:
    """Write a model that says WORDS, or calls a tool with one argument if it is told to; returns the folder.

    What a call has around its values is settled by the grammar of calls.
    """
    shutil.copytree(EMBEDDED_FOLDER, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([SAY, CALL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (WORDS, value)])
    tokenizer.save(str(folder / "tokenizer.json"))
    change(folder / "tokenizer_config.json", chat_template=TEMPLATE, model_max_length=CONTEXT_TOKENS)
    config = {
        "model_type": "llama",
        "hidden_size": SIZE,
        "num_hidden_layers": 1,
        "intermediate_size": SIZE,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": SIZE,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": CONTEXT_TOKENS,
    }
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.token_to_id("<|end|>")}))
    # In a call the grammar leaves little open: which tool it is, its argument's text, and that no other follows.
    name = tokenizer.encode(tool).tokens
    lines = [
        (SAY, WORDS, "<|end|>"),
        (CALL, "<tool_call>"),
        ('"', *name),
        ('"', value, '"}', "}", "</tool_call>", "<|end|>"),
    ]
    write_weights(folder, config, [[tokenizer.token_to_id(text) for text in line] for line in lines])
    return folder


def change(path: Path, **values: Any) -> None:
    """Change some values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_weights(folder: Path, config: dict[str, Any], lines: list[list[int | None]]) -> None:
    """Write weights by which each token of a line is followed by the next, as far as no later line has another next."""
    mx.random.seed(7)
    arguments: Any = llama.ModelArgs  # without types
    model = llama.Model(arguments.from_dict(config))
    parameters: Any = tree_flatten(model.parameters())
    weights = {name: 0.1 * mx.random.normal(array.shape) for name, array in parameters}
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
        elif name.endswith("norm.weight"):
            weights[name] = mx.ones_like(weights[name])
    embeddings = weights["model.embed_tokens.weight"] = mx.random.normal((config["vocab_size"], SIZE))
    head = mx.zeros((config["vocab_size"], SIZE))
    for weight, line in enumerate(lines, start=1):
        for token, following in pairwise(line):
            assert token is not None, "every word of the script is a token"
            head[following] = head[following] + weight * embeddings[token]
    weights["lm_head.weight"] = head
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
