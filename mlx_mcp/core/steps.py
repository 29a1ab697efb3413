"""What a step consists of. Knows neither why nor how."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mcp.core.layout import Part
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

    The first `sequence.num_shared` of them are the shared prefix's, the rest goes to the sequence's slot.
    """

    sequence: Sequence
    parts: tuple[Part, ...]
    num_tokens: int


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
    def drawing(self) -> list[Sequence]:
        """The sequences that get a token, decoding ones first."""
        return [*self.decode, *(chunk.sequence for chunk in self.prefill if chunk.last)]

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that the step computes, each once."""
        return list(dict.fromkeys([*self.decode, *(chunk.sequence for chunk in self.prefill)]))
