"""What a step consists of, as values: rows by id, their tokens, parameters and places. Knows neither why nor how.

Whoever computes steps keeps what the earlier ones said of a row, and needs nothing else: the same steps, in the same
order, give the same tokens on any runner of the same model.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mcp.core.layout import Logits, Part
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.slots import SharedPrefix, Slot


@dataclass(frozen=True)
class Admission:
    """A row that begins: its tokens so far, how its next ones are drawn, and where its keys and values go."""

    sequence_id: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]  # that it has drawn already, if it was preempted
    params: SamplingParams
    stop_ids: frozenset[int]
    slot: Slot
    prefix: SharedPrefix | None = None  # where its first tokens are, if rows share them; the slot has the rest


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one row; the last chunk yields its next token."""

    sequence_id: int
    start: int
    end: int
    last: bool  # every token there is when the step begins is computed after it


@dataclass(frozen=True)
class Decode:
    """A row that computes one token, and yields the next."""

    sequence_id: int
    token: int | None  # None in a step that runs ahead: the one that the step before draws


@dataclass(frozen=True)
class Move:
    """A row that outgrew its slot: its keys and values go to a larger one, before the step."""

    sequence_id: int
    old: Slot
    new: Slot


@dataclass(frozen=True)
class Restore:
    """A row whose first tokens come out of the cache, before the step: the parts, laid end to end.

    The first of them are the shared prefix's, the rest goes to the row's slot. If that is all there is, its next token
    is drawn from `logits`.
    """

    sequence_id: int
    parts: tuple[Part, ...]
    num_tokens: int
    logits: Logits | None = None


@dataclass(frozen=True)
class Cut:
    """A copy of a row's tokens [start, end) for the cache, taken as soon as `end` are computed."""

    sequence_id: int
    start: int
    end: int
    state: bool  # with the model's states at `end`


@dataclass(frozen=True)
class Step:
    """What the runner does next: releases and admissions, moves, restores, then the rest."""

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[Decode, ...] = ()
    moves: tuple[Move, ...] = ()
    restores: tuple[Restore, ...] = ()
    cuts: tuple[Cut, ...] = ()  # each right after the chunk or the decode pass that computes its last token
    admitted: tuple[Admission, ...] = ()
    released: tuple[int, ...] = ()  # rows that were preempted: some of them may be among the admitted

    @property
    def decoding(self) -> list[int]:
        """The rows that compute one token."""
        return [each.sequence_id for each in self.decode]

    @property
    def repeating(self) -> list[int]:
        """The rows that get a token without a pass."""
        return [restore.sequence_id for restore in self.restores if restore.logits is not None]

    @property
    def drawing(self) -> list[int]:
        """The rows that get a token, decoding ones first."""
        return [*self.decoding, *self.repeating, *(chunk.sequence_id for chunk in self.prefill if chunk.last)]

    @property
    def prompting(self) -> list[int]:
        """The rows that are at their prompts, each once."""
        return list(dict.fromkeys([*self.repeating, *(chunk.sequence_id for chunk in self.prefill)]))

    @property
    def rows(self) -> list[int]:
        """Every row that the step takes further, each once."""
        return [*self.decoding, *self.prompting]
