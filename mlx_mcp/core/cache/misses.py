"""Explains why tokens are computed that were computed before. Knows the latest prompts, and no keys and values."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from mlx_mcp.core.cache.blocks import Block
from mlx_mcp.core.cache.prefixes import Match

RECENT = 32  # prompts that are remembered, per model and tenant
SAMPLE = 16  # two prompts are one with a change if so many tokens are the same again after a difference
EXCERPT = 24  # tokens shown on each side
Tokens = tuple[int, ...]


class MissReason(StrEnum):
    """Why there was no hit where one could be expected."""

    DIVERGED = "diverged"  # an earlier prompt had the same text, except for a change at one place
    EVICTED = "evicted"  # it was cached, and was evicted
    NO_CHECKPOINT = "no_checkpoint"  # the model's states can only be continued where they were copied
    NOT_REUSABLE = "not_reusable"  # nothing of this architecture can be reused
    RECOMPUTED = "recomputed"  # it is on disk, and computing it was faster than reading it
    OTHER_MODEL = "other_model"  # the session was computed with other weights, another tokenizer or other settings


@dataclass(frozen=True)
class Miss:
    """Where the cached prefix ended, and why there."""

    reason: MissReason
    index: int  # the first token that was not taken from the cache for this reason
    before: Tokens = ()  # the tokens before it
    after: Tokens = ()  # the tokens from there on in this prompt
    earlier: Tokens = ()  # the tokens from there on in the earlier prompt
    detail: str = ""


class Recent:
    """The latest prompts of one model and principal."""

    def __init__(self) -> None:
        self._prompts: deque[bytes] = deque(maxlen=RECENT)

    def remember(self, tokens: Tokens) -> None:
        """Remember a prompt, to compare later ones with it. The same prompt is remembered once."""
        coded = array("I", tokens).tobytes()
        if coded in self._prompts:
            self._prompts.remove(coded)
        self._prompts.append(coded)

    def num_known(self, tokens: Tokens) -> int:
        """The length of the longest prefix that one of the remembered prompts has too."""
        coded = array("I", tokens).tobytes()
        return max((alike(coded, other) for other in self._prompts), default=0)

    def diverged(self, tokens: Tokens) -> Miss | None:
        """Where these tokens first differ from a remembered prompt that is the same again after the change."""
        coded = array("I", tokens).tobytes()
        for other in reversed(self._prompts):
            index = alike(coded, other)
            earlier = tuple(array("I", other[4 * index : 4 * (index + EXCERPT)]))
            if not earlier or index == len(tokens):  # one continues the other: nothing was changed
                continue
            for skip in (SAMPLE, 4 * SAMPLE, 16 * SAMPLE):
                at = 4 * (index + skip)
                sample = coded[at : at + 4 * SAMPLE]
                found = other.find(sample, 4 * index, at + 4 * (16 + 2) * SAMPLE)
                if len(sample) == 4 * SAMPLE and found >= 0 and found % 4 == 0:
                    before, after = tokens[max(0, index - EXCERPT) : index], tokens[index : index + EXCERPT]
                    return Miss(MissReason.DIVERGED, index, before, after, earlier)
        return None


class Misses:
    """The latest prompts of one model, by the root of their trees and their principal.

    What is told of a miss has words of an earlier prompt: it must be the same principal's, even where trees are shared.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.recent: dict[tuple[Block, str], Recent] = {}

    def explain(
        self,
        whose: tuple[Block, str],
        prompt: Tokens,
        match: Match,
        num_kept: int,
        other_model: bool = False,
        passed_over: bool = False,
    ) -> Miss | None:
        """Why tokens of a prompt are computed again; None if they are not, as far as is known.

        The first `num_kept` tokens are those of its session, 0 if it has none. `other_model` says that these were
        computed by another model, and `passed_over` that a tier has more than `match`, and computing is faster than
        reading it. A prompt without a session is remembered, unless an earlier one explains it.
        """
        recent = self.recent.setdefault(whose, Recent())
        got, most, size = match.num_tokens, len(prompt) - 1, self.block_tokens
        kept = min(num_kept, most)
        if not num_kept and got + size <= most:
            kept = min(recent.num_known(prompt), most) // size * size
        if got < kept:
            if other_model:
                return Miss(MissReason.OTHER_MODEL, got)
            if passed_over:
                return Miss(MissReason.RECOMPUTED, got)
            return Miss(MissReason.NO_CHECKPOINT if match.num_whole > got else MissReason.EVICTED, got)
        if num_kept:
            return None
        miss = recent.diverged(prompt) if got + size <= most else None
        recent.remember(prompt)
        return miss


def alike(one: bytes, other: bytes) -> int:
    """The number of 4-byte tokens with which two prompts begin alike. Compares few bytes more than these."""
    most, start, size = min(len(one), len(other)) // 4, 0, 64
    while start < most and one[4 * start : 4 * (start + size)] == other[4 * start : 4 * (start + size)]:
        start, size = start + size, 2 * size
    if start >= most:
        return most
    ends = range(start + 1, min(most, start + size) + 1)
    return start + bisect_left(ends, True, key=lambda n: one[4 * start : 4 * n] != other[4 * start : 4 * n])
