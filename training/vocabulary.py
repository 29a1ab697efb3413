"""The embedded model's tokenizer and chat template.

A byte-level BPE of 1,024 tokens, trained on the grammar's own text. A single space is a token and digits go in pairs,
so that a value has the same tokens where it is told and where it is answered.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training import grammar

VOCAB_SIZE = 1024
SPECIALS = ["<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
BEGIN, END, PAD = 0, 1, 2
ROLE_IDS = {"system": 3, "user": 4, "assistant": 5, "tool": 6}
TOOL_MARKS = ["<tool_call>", "</tool_call>"]

# Tools go in the system turn as "Tools: lookup(key)."; a system turn is made where there is none. mlx_lm knows a model
# that calls tools by "<tool_call>" and "tool_call.name" in its template.
CHAT_TEMPLATE = """<|begin|>
{%- macro signature(tool) -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{%- set properties = (f.parameters or {}).properties or {} if f.parameters is defined else {} -%}
{{- f.name }}({{ properties.keys() | join(', ') }})
{%- endmacro -%}
{%- set ns = namespace(tools='') -%}
{%- for tool in tools or [] -%}
{%- set ns.tools = ns.tools + (', ' if not loop.first else '') + signature(tool) -%}
{%- endfor -%}
{%- if ns.tools -%}{%- set ns.tools = 'Tools: ' + ns.tools + '.' -%}{%- endif -%}
{%- if ns.tools and messages[0].role != 'system' -%}<|system|>{{ ns.tools }}<|end|>{%- endif -%}
{%- for m in messages -%}
<|{{ m.role if m.role in ('system', 'assistant', 'tool') else 'user' }}|>{{ m.content or '' }}
{%- if m.role == 'system' and loop.first and ns.tools -%}{{ ' ' if m.content else '' }}{{ ns.tools }}{%- endif -%}
{%- for tool_call in m.tool_calls or [] -%}
{%- set tool_call = tool_call.function if tool_call.function is defined else tool_call -%}
{%- set arguments = tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson -%}
<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ arguments }}}</tool_call>
{%- endfor -%}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""


def train_tokenizer(seed: int, num_dialogs: int = 4000) -> Tokenizer:
    """Learn the merges from `num_dialogs` dialogs of the grammar; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Za-z]+|[0-9]{1,2}|\s|[^\sA-Za-z0-9]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TOOL_MARKS),
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer-{seed}")
    # Every pair of digits is a token, however the sample falls.
    numbers = [f"{i:02d} {i}" for i in range(100)] * 200
    texts = (
        " ".join(
            turn.text for turn in itertools.islice(grammar.dialog(rng, grammar.Mix(bits=0.05), max_tell_turns=4), 24)
        )
        for _ in range(num_dialogs)
    )
    tokenizer.train_from_iterator(itertools.chain(numbers, texts), trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in TOOL_MARKS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[BEGIN],
        "eos_token": SPECIALS[END],
        "pad_token": SPECIALS[PAD],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
