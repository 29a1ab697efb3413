"""Dialogs as rows of token ids, with what is to be learned marked.

A row is named by (seed, step, index): the same three give the same row on every machine, however the work is split.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
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


@dataclass
class Batch:
    """Rows of equal length, ready to learn from."""

    ids: torch.Tensor  # [B, T]
    at: torch.Tensor  # [N] flat positions whose next token is part of an answer
    targets: torch.Tensor  # [N] those next tokens
    answers: list[tuple[str, int, int]]  # (skill, start, end) within `at`


def a_batch(
    tokenizer: Tokenizer, mix: grammar.Mix, name: tuple[int, int], indices: Iterable[int], num_tokens: int
) -> Batch:
    """The rows `indices` of step `name` = (seed, step), each of `num_tokens` inputs."""
    rows, at, targets, answers = [], [], [], []
    for index in indices:
        rng = random.Random(f"row-{name[0]}-{name[1]}-{index}")
        turns = grammar.dialog(rng, mix, max_tell_turns=max(1, num_tokens // 60))
        row = encoded(tokenizer, turns, num_tokens + 1)
        for skill, start, end in row.answers:
            answers.append((skill, len(at), len(at) + end - start))
            base = len(rows) * num_tokens
            at += range(base + start - 1, base + end - 1)
            targets += row.ids[start:end]
        rows.append(row.ids[:num_tokens])
    return Batch(torch.tensor(rows), torch.tensor(at), torch.tensor(targets), answers)
