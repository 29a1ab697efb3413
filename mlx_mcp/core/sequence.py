"""One running generation: its token ids, its limits and how it ended. Knows nothing of text, threads or MLX."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from mlx_mcp.core.cache.misses import Miss
from mlx_mcp.core.sampling import Sampling
from mlx_mcp.core.slots import SharedPrefix, Slot


class FinishReason(StrEnum):
    """Why a generation ended on its own."""

    STOP = "stop"  # the model ended its answer, or a stop string was met
    LENGTH = "length"  # max_tokens were produced
    TOOL_CALLS = "tool_calls"  # the model asks for tools to be called


@dataclass(frozen=True)
class SamplingParams(Sampling):
    """How a sequence's tokens are chosen: Sampling, with values for all that a call may leave out."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token, and those of the likeliest tokens, from the model's unchanged logits."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token id, log-probability; likeliest first


class Constraint(Protocol):
    """Which tokens may come next. It belongs to one sequence, and is told of each of its tokens."""

    @property
    def awake(self) -> bool:
        """Whether it says anything of the next token."""

    def mask(self) -> bytes | None:
        """One bit per token id of the model, least significant bit of the first byte first: whether it may come next.

        None if any may, as long as it is not awake. A grammar that is complete allows the stop tokens.
        """

    def accept(self, token_id: int) -> None:
        """Take the sequence's next token, which the mask allowed."""


@dataclass(eq=False)
class Sequence:
    """A generation in the engine. Only the engine thread uses it after it was submitted."""

    sequence_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    lane: str = ""  # lanes are served round-robin when there is not room for all
    tenant: str = ""  # the tenant with whose prompts it may share keys and values
    num_kept: int = 0  # the number of its session's tokens whose keys and values there were after the latest turn
    other_model: bool = False  # these were computed by another model, or with other settings
    ephemeral: bool = False  # what it computes never leaves memory
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in the cache
    slot: Slot | None = None  # where these are; None while it waits
    prefix: SharedPrefix | None = None  # where the first of them are, if rows share them; the slot has the rest
    num_cached: int = 0  # of the prompt, when it was first admitted: tokens that were in the cache
    num_restored: int = 0  # of these came from a tier for it
    miss: Miss | None = None  # why not more
    num_preemptions: int = 0  # times it gave up its slot and was computed again
    made_place: bool = False  # it was preempted for a lane that ran nothing, which happens to it at most once
    finish_reason: FinishReason | None = None
    group: str = ""  # of lanes; groups of a principal are served round-robin
    principal: str = ""  # of groups; principals are served round-robin

    @property
    def num_tokens(self) -> int:
        """The number of its tokens: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_shared(self) -> int:
        """The number of tokens at its beginning that are in a shared prefix, and not in its slot."""
        return 0 if self.prefix is None else self.prefix.num_tokens

    @property
    def max_length(self) -> int:
        """The most tokens whose keys and values it may have to hold."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def decoding(self) -> bool:
        """Whether everything but its latest output token is computed."""
        return bool(self.output_ids) and self.num_computed == self.num_tokens - 1

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Token ids [start, end) of prompt and output, concatenated."""
        split = len(self.prompt_ids)
        return (*self.prompt_ids[start:end], *self.output_ids[max(0, start - split) : max(0, end - split)])

    def append(self, token_id: int) -> None:
        """Take the next token. A stop token ends the sequence, and is not part of its output."""
        assert self.finish_reason is None, f"sequence {self.sequence_id} already finished"
        if token_id in self.stop_ids:
            self.finish_reason = FinishReason.STOP
            return
        self.output_ids.append(token_id)
        if len(self.output_ids) >= self.params.max_tokens:
            self.finish_reason = FinishReason.LENGTH
