"""Tokenizers and templates of several families, as the tests make them, and how the tests read with them."""

from collections.abc import Iterable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from mlx_mcp.chat.answer import Piece
from mlx_mcp.chat.message import Message, ToolCall
from mlx_mcp.chat.prompt import Prompt
from mlx_mcp.mlx_backend.tokenizer import ChatTokenizer
from tests.models_made import TEMPLATE, write_tokenizer

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
ASSISTANT = "<|im_start|>assistant\n"

# As Qwen3's: `tool_call.name` is what mlx_lm knows the notation by.
JSON_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{# <tool_call> tool_call.name #}"
THINKING = (
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
)
QWEN: dict[str, Any] = {
    "template": JSON_TOOLS + TEMPLATE + THINKING,
    "added": ["<think>", "</think>", "<tool_call>", "</tool_call>"],
}
MISTRAL: dict[str, Any] = {"template": TEMPLATE + "{# [TOOL_CALLS] #}", "special": ["[TOOL_CALLS]", "[ARGS]", "[INST]"]}
LFM = {"template": TEMPLATE, "special": ["<|tool_call_start|>", "<|tool_call_end|>"]}
HARMONY = {"template": TEMPLATE, "special": ["<|channel|>", "<|message|>", "<|start|>", "<|end|>"]}

# How families of models go about a chat, as far as going on with one depends on it.
FAMILIES: dict[str, dict[str, Any]] = {
    "chatml": QWEN,
    # Tools in the user's first message; a date before all of it.
    "llama": {
        "template": "<|begin_of_text|>{% set system = messages[0].role == 'system' %}"
        "<|header|>system<|/header|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n"
        "{{ messages[0].content if system }}<|eot|>"
        "{% for m in messages[system | int:] %}<|header|>{{ m.role }}<|/header|>\n\n"
        "{% if loop.first and tools %}{{ tools | tojson }}\n\n{% endif %}{{ m.content | trim }}<|eot|>{% endfor %}"
        "<|header|>assistant<|/header|>\n\n{# <tool_call> tool_call.name #}",
        "special": ["<|begin_of_text|>", "<|header|>", "<|/header|>", "<|eot|>"],
    },
    # The system prompt in the user's first message; strict alternation; other names for roles.
    "gemma": {
        "template": "<bos>{% set system = messages[0].role == 'system' %}{% for m in messages[system | int:] %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ messages[0].content + '\n\n' if system and loop.first }}{{ m.content | trim }}<end>\n{% endfor %}"
        "{{ '<turn>model\n' }}",
        "special": ["<bos>", "<turn>", "<end>"],
    },
    # System prompt and tools with the user's last message.
    "mistral": {
        "template": "<s>{% set system = messages[0].role == 'system' %}{% for m in messages[system | int:] %}"
        "{% if m.role == 'user' %}{% if loop.last %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' if tools }}"
        "{% endif %}[INST]{{ messages[0].content + '\n\n' if system and loop.last }}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{# [TOOL_CALLS] #}",
        "special": ["<s>", "</s>", "[TOOLS]", "[/TOOLS]", "[INST]", "[/INST]"],
    },
    "none": {"template": None},
}

LOOK: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "look", "description": "Look there.", "parameters": {}}},
)
HI = [Message("user", "hi")]
SYSTEM, ASKED, ANSWERED = Message("system", "be brief"), Message("user", "the agent"), Message("assistant", "reads")


def make_tokenizer(
    folder: Path, template: str | None = TEMPLATE, added: Iterable[str] = (), special: Iterable[str] = ()
) -> ChatTokenizer:
    """A tokenizer with a template, and with more tokens."""
    write_tokenizer(folder, template)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(path)
    return ChatTokenizer(folder, None)


def make_sentencepiece(folder: Path) -> ChatTokenizer:
    """One that spells with bytes, puts a space before a text, and drops the first space when it decodes."""
    vocab = ["<unk>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    spm = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True))
    spm.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spm.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    write_tokenizer(folder, None)
    spm.save(str(folder / "tokenizer.json"))
    return ChatTokenizer(folder, None)


def encoded(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """The ids of a text, in which control tokens count."""
    ids: list[int] = tokenizer._tokenizer.encode(text, add_special_tokens=False)
    return ids


def decoded(tokenizer: ChatTokenizer, ids: Iterable[int]) -> str:
    """The text of ids, control tokens included."""
    text: str = tokenizer._tokenizer.decode(ids, skip_special_tokens=False)
    return text


def joined(pieces: Iterable[Piece]) -> list[tuple[str, str]]:
    """Pieces end to end, one per run of a kind."""
    return [(kind.value, "".join(p.text for p in run)) for kind, run in groupby(pieces, key=lambda p: p.kind)]


def read(
    tokenizer: ChatTokenizer,
    *parts: str,
    reasoning: bool = False,
    tools: tuple[dict[str, Any], ...] = LOOK,
    plain: bool = False,
    cut: bool = False,
) -> tuple[list[tuple[str, str]], list[ToolCall]]:
    """What a reader makes of an answer whose parts are encoded one by one: its pieces and its calls."""
    reader = tokenizer.reader(Prompt((), reasoning), tools, plain)
    pieces = [piece for part in parts for token_id in encoded(tokenizer, part) for piece in reader.add(token_id)]
    return joined(pieces + reader.finish(cut)), list(reader.tool_calls)


def cut(text: str, cuts: Iterable[int]) -> list[str]:
    """The text, cut at these places."""
    ends = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]
