"""Batches to learn from.

A row is named by (seed, step, index): the same three give the same row on every machine, however the work is split.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from training import grammar
from training.rows import encoded


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
