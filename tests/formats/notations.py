"""The table of notations in docs/models.md: what each family's calls look like, and what is known of it."""

from __future__ import annotations

import re
import sys

from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.formats.format import Marks
from mlx_mcp.chat.reader_of import reader_of
from tests.chat.written import ARGUMENTS, FAMILIES, PYTHON, TOOLS, Written, objects
from tests.formats.canitoolcall_cases import ROOT

TABLE = re.compile(r"(<!-- notations -->\n).*?(<!-- end of notations -->)", re.DOTALL)
MODELS = {
    "hermes": "Hermes, Qwen 2.5 and 3, QwQ, SmolLM3, Granite 4, MiMo, Bielik, Reka, EXAONE 4",
    "qwen-xml": "Qwen3-Coder, Qwen 3.5 and later, Nemotron 3, Step 3.5",
    "seed-oss": "Seed-OSS",
    "glm": "GLM 4.5 and later, Laguna, Ling 3, Spark 2.5",
    "longcat": "LongCat",
    "hunyuan": "Hunyuan 3",
    "minimax-m2": "MiniMax-M2",
    "minimax-m3": "MiniMax-M3",
    "minicpm": "MiniCPM5",
    "dsml": "DeepSeek V3.2 and V4",
    "dsml-4.1": "DeepSeek V4.1",
    "deepseek": "DeepSeek V3.1",
    "deepseek-v3": "DeepSeek V3 and R1",
    "kimi-k2": "Kimi K2",
    "kimi-k3": "Kimi K3",
    "solar": "Solar Open",
    "gemma-4": "Gemma 4",
    "function-gemma": "FunctionGemma",
    "cohere": "Command R7B, Command A, Cohere 2 MoE",
    "command-r": "Command R and R+",
    "apertus": "Apertus",
    "internlm": "InternLM 2.5 and 3",
    "gigachat": "GigaChat 3",
    "nemotron": "Nemotron Nano v2",
    "tool-calls": "Apriel, Jamba, Hunyuan A13B",
    "minimax-m1": "MiniMax-M1",
    "mistral": "Mistral Small 3.2, Magistral, Ministral 3, Devstral",
    "mistral-v3": "Mistral 7B v0.3, Nemo",
    "phi-4": "Phi-4-mini",
    "granite": "Granite 3",
    "firefunction": "FireFunction v2",
    "functionary-v3.1": "Functionary v3.1",
    "lfm": "LFM2, LFM2.5",
    "olmo": "OLMo 3",
    "llama": "Llama 3.1, 3.2, 3.3",
    "llama-4": "Llama 4",
    "harmony": "gpt-oss",
    "muse": "Muse",
    "functionary-v3.2": "Functionary v3.2",
}


def cell(text: str) -> str:
    """A text as code in a table."""
    shown = text.replace("\n", "⏎").replace("|", r"\|")
    ticks = "````" if "`" in shown else "`"
    return f"{ticks}{' ' * (len(ticks) > 1)}{shown}{' ' * (len(ticks) > 1)}{ticks}" if shown else ""


def call_of(family: Written) -> str:
    """A call of `stop` alone, as the family writes it."""
    reader = reader_of(family.form, False, TOOLS)
    pieces = reader.feed(family.calls) + reader.finish()
    call = [piece.text for piece in pieces if piece.kind is TextKind.TOOL_CALL][-1]
    for first in (*objects(), *objects("tool_name", "parameters"), PYTHON[0], f'{{"look": {ARGUMENTS}}}'):
        if "look" in first:
            call = call.replace(f"{first}, ", "").replace(f"{first}\n", "")
    sections = family.form.calls.sections if family.form.calls else ()
    around = next((section for section in sections if section.begin in family.calls), Marks("", ""))
    return f"{around.begin}{call}{around.end}"


def table() -> str:
    """The table."""
    lines = [
        "| models | thoughts begin | a call of `stop`, which has no arguments | by a grammar |",
        "|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        grammar = "yes" if family.form.calls and family.form.calls.grammar(TOOLS) else "no"
        lines.append(f"| {MODELS[name]} | {cell(family.thoughts[0])} | {cell(call_of(family))} | {grammar} |")
    return "\n".join(["", *lines, "", ""])


if __name__ == "__main__":
    path = ROOT / "docs" / "models.md"
    path.write_text(TABLE.sub(lambda found: f"{found[1]}{table()}{found[2]}", path.read_text()))
    sys.stdout.write(f"{path}: the table of notations is current\n")
