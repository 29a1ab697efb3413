"""Which format a model's family has, by its chat template and its vocabulary."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mlx_mcp.chat.formats.format import PLAIN, CallSyntax, Format, Marks
from mlx_mcp.chat.formats.harmony import HARMONY
from mlx_mcp.chat.formats.json_calls import JsonCalls, NamedCalls
from mlx_mcp.chat.formats.xml_calls import PairCalls, XmlCalls

# The markers of thoughts, in the order in which they are looked for.
THOUGHTS = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<mm:think>", "</mm:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),
    Marks("<longcat_think>", "</longcat_think>"),
    Marks("<|think:start|>", "<|think:end|>"),
    Marks("<thinking>", "</thinking>"),
)


@dataclass(frozen=True)
class Family:
    """A family's notation of calls, and texts that its templates or vocabularies all have."""

    calls: CallSyntax
    signs: tuple[str, ...]


def _tags(begin: str, end: str = "") -> Marks:
    return Marks(begin, end or begin.replace("<", "</", 1))


QWEN_XML = XmlCalls(
    name="qwen-xml",
    openers=("<function=", "<function "),
    after="</function>",
    section=_tags("<tool_call>"),
    within=("{",),
    parameter=Marks("<parameter", "</parameter>"),
    padded=True,
)
GLM = PairCalls(
    name="glm", openers=("<tool_call>",), after="</tool_call>", key=_tags("<arg_key>"), value=_tags("<arg_value>")
)
HERMES = JsonCalls(name="hermes", openers=("<tool_call>",), after="</tool_call>", resume="</tool_call>")
MISTRAL = NamedCalls(name="mistral", openers=("[TOOL_CALLS]",), args="[ARGS]", call_id="[CALL_ID]")

# In order: the first family whose signs are all there.
FAMILIES = (
    Family(QWEN_XML, ("<function=", "<parameter=", "<tool_call>")),
    Family(GLM, ("<arg_key>", "<arg_value>", "<tool_call>")),
    Family(MISTRAL, ("[TOOL_CALLS]",)),
    Family(HERMES, ("<tool_call>",)),
)


def format_of(template: str | None, vocabulary: Collection[str]) -> Format:
    """The format of a model, by the text of its chat template and its tokens; the plain one if none is known."""
    text = template or ""

    def known(sign: str) -> bool:
        return sign in text or sign in vocabulary

    if known("<|channel|>") and known("<|message|>"):
        return HARMONY
    family = next((family for family in FAMILIES if all(map(known, family.signs))), None)
    thoughts = tuple(marks for marks in THOUGHTS if known(marks.begin) and known(marks.end))
    if family is None and not thoughts:
        return PLAIN
    return Format(family.calls.name if family else "thoughts", thoughts, family.calls if family else None)
