"""One running generation: its token ids, its limits and how it ended. Knows nothing of text, threads or MLX."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a generation ended on its own."""

    STOP = "stop"  # the model ended its turn, or a stop string was met
    LENGTH = "length"  # max_tokens were produced


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    `temperature` 0 is greedy. `top_p` keeps the smallest set of likeliest tokens whose probability reaches it. The same
    `seed` on the same tokens draws the same text, whatever else is running.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(eq=False)
class Sequence:
    """A generation in the engine. Only the engine thread touches one after it was submitted."""

    sequence_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    num_computed: int = 0  # tokens whose keys and values are in the cache
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def num_uncomputed_prompt(self) -> int:
        """Prompt tokens that prefill has yet to compute."""
        return max(0, len(self.prompt_ids) - self.num_computed)

    @property
    def last_id(self) -> int:
        """The token that decode feeds next."""
        return self.output_ids[-1]

    def append(self, token_id: int) -> None:
        """Take the next token; a stop token ends the sequence and is not part of its output."""
        assert self.finish_reason is None, f"sequence {self.sequence_id} already finished"
        if token_id in self.stop_ids:
            self.finish_reason = FinishReason.STOP
            return
        self.output_ids.append(token_id)
        if len(self.output_ids) >= self.params.max_tokens:
            self.finish_reason = FinishReason.LENGTH
