"""Dialogs as rows of token ids, with the answers marked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from training import grammar
from training.vocabulary import BEGIN, END, PAD, ROLE_IDS


@dataclass
class Row:
    """Token ids of one dialog, and the spans [start, end) of its answers by skill, the end of turn included."""

    ids: list[int] = field(default_factory=lambda: [BEGIN])
    answers: list[tuple[str, int, int]] = field(default_factory=list)

    def add(self, tokenizer: Tokenizer, turn: grammar.Turn) -> None:
        """Append one turn."""
        self.ids.append(ROLE_IDS[turn.role])
        start = len(self.ids)
        self.ids += tokenizer.encode(turn.text, add_special_tokens=False).ids
        self.ids.append(END)
        if turn.skill:
            self.answers.append((turn.skill, start, len(self.ids)))


def encoded(tokenizer: Tokenizer, turns: Iterable[grammar.Turn], num_tokens: int) -> Row:
    """The row of `turns`, read until it holds `num_tokens`, cut there; an answer that the cut meets is left out."""
    row = Row()
    for turn in turns:
        row.add(tokenizer, turn)
        if len(row.ids) >= num_tokens:
            break
    row.answers = [answer for answer in row.answers if answer[2] <= num_tokens]
    row.ids = row.ids[:num_tokens] + [PAD] * (num_tokens - len(row.ids))
    return row
