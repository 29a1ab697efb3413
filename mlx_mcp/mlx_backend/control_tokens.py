"""Keeps control tokens that callers write in their texts plain text, through template and encoding.

Before a chat is rendered a private-use character, the mark, takes the place of each control token in the callers' text.
What is a control token in the rendered text was therefore written by the template. After rendering, each mark is
encoded as the plain text of its control token, cut so that no tokenizer makes a control token of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class MarkedText:
    """A text with marks in it."""

    text: str
    marks: dict[str, str]  # control token → its mark

    def pieces(self) -> list[str]:
        """The text in pieces to encode one by one: each mark is two pieces of its control token's text."""
        pieces, start = [], 0
        controls = {mark: control for control, mark in self.marks.items()}
        for found in re.finditer(f"[{''.join(controls)}]" if controls else r"(?!)", self.text):
            control = controls[found[0]]
            pieces += [self.text[start : found.start()], control[:1], control[1:]]
            start = found.end()
        pieces.append(self.text[start:])
        return pieces


class ControlTokens:
    """The control tokens of a tokenizer: added tokens that are special, or in angle or square brackets."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.get_added_vocab()
        special = set(tokenizer.all_special_tokens)
        texts = [t for t in added if len(t) > 1 and (t in special or (t[0] in "<[" and t[-1] in ">]"))]
        self.ids = {text: added[text] for text in texts}
        self.texts = {added[text]: text for text in texts}  # by id
        self._longest_first = sorted(texts, key=len, reverse=True)  # a control token may contain a shorter one
        self.pattern = re.compile("|".join(map(re.escape, self._longest_first)) or r"(?!)")

    def marks(self, unused: Iterator[str]) -> dict[str, str]:
        """A mark for each control token."""
        return dict(zip(self._longest_first, unused, strict=False))

    def marked(self, value: Any, marks: dict[str, str]) -> Any:
        """The value with each control token in its strings replaced by its mark."""
        match value:
            case str():
                return self.pattern.sub(lambda found: marks[found[0]], value)
            case dict():
                return {self.marked(key, marks): self.marked(part, marks) for key, part in value.items()}
            case list() | tuple():
                return [self.marked(part, marks) for part in value]
            case _:
                return value

    def cut(self, text: str) -> list[str]:
        """The text in pieces, cut within each control token that it spells, so that it stays text."""
        ends = [found.start() + 1 for found in self.pattern.finditer(text)]
        return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def unused_characters(text: str) -> Iterator[str]:
    """The private-use characters that are not in the text."""
    used = set(text)
    return (c for c in map(chr, PRIVATE_USE) if c not in used)
