"""A step as values: rows by id, their tokens, parameters and places. Knows neither its reason nor how it is computed.

A runner keeps what earlier steps said of a row, and needs nothing else: the same steps in the same order give the same
tokens on any runner of the same model.
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
    output_ids: tuple[int, ...]  # those that it had drawn before it was preempted
    params: SamplingParams
    stop_ids: frozenset[int]
    slot: Slot
    prefix: SharedPrefix | None = None  # where its first tokens are, if rows share them; the slot has the rest


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one row, which are computed; the last chunk yields the row's next token."""

    sequence_id: int
    start: int
    end: int
    last: bool  # whether all tokens of the row are computed after it


@dataclass(frozen=True)
class Decode:
    """A row of which one token is computed, which yields the next one."""

    sequence_id: int
    token: int | None  # None in a step that runs ahead, where it is the token that the step before draws


@dataclass(frozen=True)
class Move:
    """A row that outgrew its slot: its keys and values are copied to a larger one before the step."""

    sequence_id: int
    old: Slot
    new: Slot


@dataclass(frozen=True)
class Restore:
    """A row whose first tokens are copied out of the cache before the step: the parts, concatenated.

    Tokens of a shared prefix are written there, and the others to the row's slot. If the row has no other tokens, its
    next token is drawn from `logits`; of a row that ends with this token no tokens are restored.
    """

    sequence_id: int
    parts: tuple[Part, ...]
    num_tokens: int
    logits: Logits | None = None

    @property
    def brings_anything(self) -> bool:
        """Whether the row begins with anything."""
        return self.num_tokens > 0 or self.logits is not None


@dataclass(frozen=True)
class Cut:
    """A copy of a row's tokens [start, end) for the cache. It is made when the first `end` tokens are computed."""

    sequence_id: int
    start: int
    end: int
    state: bool  # whether the model's states at `end` are copied too


@dataclass(frozen=True)
class Step:
    """What the runner does next. It releases and admits rows, moves and restores them, and then computes."""

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[Decode, ...] = ()
    moves: tuple[Move, ...] = ()
    restores: tuple[Restore, ...] = ()
    cuts: tuple[Cut, ...] = ()  # each is made right after the chunk or the decode pass that computes its last token
    admitted: tuple[Admission, ...] = ()
    released: tuple[int, ...] = ()  # rows that were preempted; some of them may be among the admitted

    @property
    def decoding(self) -> list[int]:
        """The rows of which one token is computed."""
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
        """The rows whose prompts are read, each once."""
        return list(dict.fromkeys([*self.repeating, *(chunk.sequence_id for chunk in self.prefill)]))

    @property
    def rows(self) -> list[int]:
        """All rows that the step computes or draws for, each once."""
        return [*self.decoding, *self.prompting]
