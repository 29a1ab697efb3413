"""Decides which sequences run next. Knows nothing of text, threads or MLX.

A step holds every decoding sequence and prefill chunks within a token budget, so that a long prompt delays the others'
next token by one chunk and no more. Sequences are admitted first come, first served.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from mlx_mcp.core.sequence import Sequence
from mlx_mcp.errors import CapacityError


@dataclass(frozen=True)
class Limits:
    """What one scheduler may hold.

    A chunk is `chunk_tokens` long and begins at a multiple of it, whatever the budget: a prompt is always cut at the
    same places, so that the same prompt gives the same keys and values.
    """

    max_running: int = 16
    max_waiting: int = 1024
    chunk_tokens: int = 128
    prefill_tokens_idle: int = 512  # per step, while nothing decodes
    prefill_tokens_busy: int = 128  # per step, while something decodes


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens [start, end) of one sequence; the last chunk of a prompt yields its first token."""

    sequence: Sequence
    start: int
    end: int

    @property
    def last(self) -> bool:
        """Whether the prompt is whole after this chunk."""
        return self.end == len(self.sequence.prompt_ids)


@dataclass(frozen=True)
class Step:
    """What the runner does next."""

    prefill: tuple[Chunk, ...]
    decode: tuple[Sequence, ...]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.prefill and not self.decode


class Scheduler:
    """The waiting and the running sequences of one model."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether schedule() would return a step that does something."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue.

        Raises:
            CapacityError: every place is taken, and `max_waiting` sequences wait for one.
        """
        if len(self.waiting) + len(self.running) >= self.limits.max_running + self.limits.max_waiting:
            raise CapacityError(
                f"{len(self.running)} calls are running and {len(self.waiting)} waiting, as many as are allowed.", 5
            )
        self.waiting.append(sequence)

    def schedule(self) -> Step:
        """Admit what fits and choose the next step's work."""
        while self.waiting and len(self.running) < self.limits.max_running:
            self.running.append(self.waiting.popleft())
        decode = tuple(s for s in self.running if not s.num_uncomputed_prompt)
        budget = self.limits.prefill_tokens_busy if decode else self.limits.prefill_tokens_idle
        chunks: list[Chunk] = []
        for sequence in self.running:
            start = sequence.num_computed
            while start < len(sequence.prompt_ids) and budget > 0:
                end = min(start + self.limits.chunk_tokens, len(sequence.prompt_ids))
                chunks.append(Chunk(sequence, start, end))
                budget -= end - start
                start = end
        return Step(tuple(chunks), decode)

    def commit(self, step: Step, tokens: dict[int, int]) -> list[Sequence]:
        """Take the step's new tokens, by sequence id; returns the sequences that finished, which hold no place more."""
        for chunk in step.prefill:
            chunk.sequence.num_computed = chunk.end
        for sequence in step.decode:
            sequence.num_computed += 1
        by_id = {s.sequence_id: s for s in self.running}
        finished = []
        for sequence_id, token_id in tokens.items():
            sequence = by_id[sequence_id]
            sequence.append(token_id)
            if sequence.finish_reason is not None:
                self.running.remove(sequence)
                finished.append(sequence)
        return finished

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is: cancelled or failed."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def num_ahead(self, sequence: Sequence) -> int:
        """How many sequences must be admitted before this waiting one; 0 once it runs."""
        return self.waiting.index(sequence) + 1 if sequence in self.waiting else 0
