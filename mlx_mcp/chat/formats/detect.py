"""Which format a model's family has, by its chat template and its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Collection

from mlx_mcp.chat.formats.families import APRIEL, APRIEL_END, ENVELOPES, FAMILIES, THOUGHTS, Family, pairs, tags
from mlx_mcp.chat.formats.format import PLAIN, Format
from mlx_mcp.chat.formats.messages import FUNCTIONARY, HARMONY, MUSE

# Formats whose answers consist of messages, with what they are known by.
MESSAGES = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    (MUSE, ("<atem:function_calls>",)),
    (FUNCTIONARY, (">>>all\\n", ">>>${recipient}")),
)
# Hunyuan 3's markers end with a word that its template names once.
_HUNYUAN = re.compile(r"HYTK = '([^']*)'")


def format_of(template: str | None, vocabulary: Collection[str]) -> Format:
    """The format of a model, by the text of its chat template and its tokens; the plain one if none is known."""
    text = template or ""

    def known(sign: str) -> bool:
        return sign in text or sign in vocabulary

    # A template says more than a vocabulary, which may have the markers of several generations of a family.
    for has in (text.__contains__, known):
        for form, signs in MESSAGES:
            if all(map(has, signs)):
                return form
        family = _hunyuan(text, vocabulary) or next((one for one in FAMILIES if all(map(has, one.signs))), None)
        if family is not None:
            break
    common = [marks for marks in THOUGHTS if known(marks.begin) and known(marks.end)]
    words = [APRIEL] if known(APRIEL.end) else []
    thoughts = (*(family.thoughts if family else ()), *common, *words)
    if family is None and not thoughts:
        return PLAIN
    envelopes = tuple(marks for asked, marks in ENVELOPES.items() if asked in text)
    frame = (*(family.frame if family else ()), *([APRIEL_END] if words else ()))
    if family is None:
        return Format("thoughts", thoughts, None, frame, envelopes)
    return Format(family.calls.name, thoughts, family.calls, frame, envelopes, family.calls_in_thoughts)


def _hunyuan(template: str, vocabulary: Collection[str]) -> Family | None:
    begin = "<tool_sep:"
    found = _HUNYUAN.search(template)
    token = next((token for token in vocabulary if token.startswith(begin)), "")
    if found is None and not token:
        return None
    suffix = found[1] if found else token.removeprefix("<tool_sep").removesuffix(">")
    calls = pairs("hunyuan", "", suffix, f"<tool_sep{suffix}>", f"<tool_calls{suffix}>")
    return Family(calls, (), (tags(f"<think{suffix}>"),))
