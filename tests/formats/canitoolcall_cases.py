"""The cases of canitoolcall, a neutral conformance suite, read by our readers; and the table of them in docs/models.md.

The package replays tokens through an engine's own parser, with tokenizers that it downloads. Our readers take text, so
its cases and its judge are used, and not its runner: each text is given whole, by character, cut at the family's
markers, and cut at random.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from canitoolcall.checks import case_status, run_checks
from canitoolcall.fixtures import Family, Fixture, load_families, load_fixtures
from canitoolcall.results import CheckResult, Observation, ParsedToolCall, ParseResult, Status

from mlx_mcp.chat.answer import TextKind
from mlx_mcp.chat.formats.detect import format_of
from mlx_mcp.chat.formats.format import Format
from mlx_mcp.chat.reader_of import reader_of

ROOT = Path(__file__).parents[2]
TABLE = re.compile(r"(<!-- canitoolcall -->\n).*?(<!-- end -->)", re.DOTALL)

THINK = ("<think>", "</think>")
# What is known of the models: tokens of their vocabularies, by family and variant.
VOCABULARIES: dict[str, dict[str, tuple[str, ...]]] = {
    "deepseek": {
        "deepseek-v3": ("<｜tool▁calls▁begin｜>",),
        "deepseek-v31": ("<｜tool▁calls▁begin｜>", *THINK),
        "": ("｜DSML｜", *THINK),
    },
    "gemma4": {"": ("<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>")},
    "glm": {"": ("<tool_call>", "<arg_key>", "<arg_value>", *THINK)},
    "gpt-oss": {"": ("<|channel|>", "<|message|>")},
    "kimi": {
        "kimi-k2-instruct": ("<|tool_calls_section_begin|>",),
        "kimi-k3-xtml": ("<|open|>", "<|close|>", "<|sep|>"),
        "": ("<|tool_calls_section_begin|>", *THINK),
    },
    "llama": {"llama4-pythonic": ("<|python_start|>",), "": ("<|python_tag|>",)},
    "mistral": {"v11-think-text": ("[TOOL_CALLS]", *THINK), "": ("[TOOL_CALLS]", "[THINK]", "[/THINK]")},
    "qwen3-hermes": {"": ("<tool_call>", *THINK)},
    "qwen3-xml": {"": ("<tool_call>", "<function=", "<parameter=", *THINK)},
}

CUT_CALL = "a call that max_tokens cut off is text, with a note; the suite wants it dropped"
# The cases that do not pass, and why.
LISTED = {
    "deepseek/v32-truncated-second-parallel-call": CUT_CALL,
    "deepseek/v4-truncated-second-parallel-call": CUT_CALL,
    "deepseek/v41-truncated-second-parallel-call": CUT_CALL,
    "gemma4/truncated-second-parallel-call": CUT_CALL,
    "qwen3-hermes/truncated-second-parallel-call": CUT_CALL,
    "gpt-oss/llamacpp-builtin-python-recipient": "a call of a tool that was not offered is shown as text, with a note",
    "kimi/k2i-vllm-noise-between-markers": "text between the markers of calls is shown; the suite wants it dropped",
    "qwen3-xml/llamacpp-q35-call-inside-think": "a call that is drafted inside thoughts is thought, with a note",
}


@cache
def families() -> dict[str, Family]:
    """The suite's families, by name."""
    return load_families()


@cache
def fixtures() -> dict[str, Fixture]:
    """The suite's cases, by name."""
    return {fixture.id: fixture for fixture in load_fixtures()}


def form_of(fixture: Fixture) -> Format:
    """The format that is recognised for the case's model."""
    reference = families()[fixture.family].reference_for(fixture.reference_model)
    variants = VOCABULARIES[fixture.family]
    variant = reference.variant if reference else None
    return format_of(None, variants.get(variant or "", variants.get("", ())))


def parse(fixture: Fixture, parts: Iterable[str]) -> ParseResult:
    """What our reader makes of the case's text, given in these parts."""
    reference = families()[fixture.family].reference_for(fixture.reference_model)
    prompt = fixture.generation_prompt
    if prompt is None:
        prompt = reference.default_generation_prompt if reference else None
    form = form_of(fixture)
    reader = reader_of(form, form.opened_thoughts(prompt or "") is not None, [dict(tool) for tool in fixture.tools])
    pieces = [piece for part in parts for piece in reader.feed(part)] + reader.finish("truncated" in fixture.tags)
    answer, thoughts = (
        "".join(piece.text for piece in pieces if piece.kind is kind) for kind in (TextKind.ANSWER, TextKind.REASONING)
    )
    calls = (ParsedToolCall(call.name, json.dumps(call.arguments)) for call in reader.tool_calls)
    return ParseResult(answer or None, thoughts or None, tuple(calls))


def ways(fixture: Fixture, num_random: int) -> dict[str, list[str]]:
    """The case's text in parts, by the names that the suite has for such ways."""
    text, markers = fixture.raw_output, families()[fixture.family].markers
    at_markers = re.split(f"({'|'.join(map(re.escape, markers))})", text)
    found = {"one": [text], "token": list(text), "special": list(filter(None, at_markers))}
    for seed in range(num_random):
        chance, longest = random.Random(seed), (2, 8, 40)[seed % 3]
        parts, pos = [], 0
        while pos < len(text):
            size = chance.randint(1, longest)
            parts.append(text[pos : pos + size])
            pos += size
        found[f"rand:{seed}:{longest}"] = parts
    return found


def judged(fixture: Fixture, num_random: int = 3) -> tuple[Status, list[CheckResult]]:
    """The suite's judgement of how our reader reads the case, whole and in parts."""
    whole = parse(fixture, [fixture.raw_output])
    streams = {name: parse(fixture, parts) for name, parts in ways(fixture, num_random).items()}
    rows = run_checks(fixture, families()[fixture.family], Observation(whole, streams))
    return case_status(rows), [row for row in rows if row.status is Status.FAIL]


def table() -> str:
    """The table of families in docs/models.md."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in families()}
    for fixture in fixtures().values():
        status = judged(fixture, 0)[0]
        counts[fixture.family]["listed" if fixture.id in LISTED else status.value] += 1
    lines = ["| family | cases | pass | pass but for white space | listed below |", "|---|---|---|---|---|"]
    for name, count in counts.items():
        figures = (count.total(), count["pass"], count["soft_pass"], count["listed"])
        title = families()[name].name.replace("|", r"\|")
        lines.append(f"| {title} | {' | '.join(map(str, figures))} |")
    reasons: dict[str, list[str]] = {}
    for case, reason in LISTED.items():
        reasons.setdefault(reason, []).append(f"`{case}`")
    listed = [f"- {reason}: {', '.join(cases)}" for reason, cases in reasons.items()]
    return "\n".join(["", *lines, "", *listed, ""])


if __name__ == "__main__":
    path = ROOT / "docs" / "models.md"
    written = TABLE.sub(lambda found: f"{found[1]}{table()}\n{found[2]}", path.read_text())
    path.write_text(written)
    sys.stdout.write(f"{path}: the table of families is current\n")
