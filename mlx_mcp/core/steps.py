"""What a step consists of. Knows neither why nor how."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mcp.core.layout import Logits, Part
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.core.slots import Slot


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one sequence; the last chunk yields its next token."""

    sequence: Sequence
    start: int
    end: int
    last: bool  # every token there is when the step begins is computed after it


@dataclass(frozen=True)
class Move:
    """A sequence that outgrew its slot: its keys and values go to a larger one, before the step."""

    sequence: Sequence
    old: Slot
    new: Slot


@dataclass(frozen=True)
class Restore:
    """A sequence whose first tokens come out of the cache, before the step: the parts, laid end to end.

    The first `sequence.num_shared` of them are the shared prefix's, the rest goes to the sequence's slot. If that is
    all there is, its next token is drawn from `logits`.
    """

    sequence: Sequence
    parts: tuple[Part, ...]
    num_tokens: int
    logits: Logits | None = None


@dataclass(frozen=True)
class Cut:
    """A copy of a sequence's tokens [start, end) for the cache, taken as soon as `end` are computed."""

    sequence: Sequence
    start: int
    end: int
    state: bool  # with the model's states at `end`


@dataclass(frozen=True)
class Step:
    """What the runner does next: moves, then restores, then the rest."""

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[Sequence, ...] = ()
    moves: tuple[Move, ...] = ()
    restores: tuple[Restore, ...] = ()
    cuts: tuple[Cut, ...] = ()  # each right after the chunk or the decode pass that computes its last token
    preempted: tuple[Sequence, ...] = ()  # gave up their slots before the step

    @property
    def repeating(self) -> list[Sequence]:
        """The sequences that get a token without a pass."""
        return [restore.sequence for restore in self.restores if restore.logits is not None]

    @property
    def drawing(self) -> list[Sequence]:
        """The sequences that get a token, decoding ones first."""
        return [*self.decode, *self.repeating, *(chunk.sequence for chunk in self.prefill if chunk.last)]

    @property
    def prompting(self) -> list[Sequence]:
        """The sequences that are at their prompts, each once."""
        return list(dict.fromkeys([*self.repeating, *(chunk.sequence for chunk in self.prefill)]))

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that the step takes further, each once."""
        return [*self.decode, *self.prompting]
