"""Computes steps: one row at a time over mlx-lm's own caches, so that every row is bitwise what it is alone.

Engine thread only: MLX streams belong to the thread that made them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_mcp.core.ports import StepResult
from mlx_mcp.core.scheduler import Step
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.mlx_backend.sampler import next_token


class RowRunner:
    """A model and the caches of its live rows."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.caches: dict[int, list[Any]] = {}

    @property
    def num_rows(self) -> int:
        """Rows that hold keys and values now."""
        return len(self.caches)

    def run(self, step: Step) -> StepResult:
        """Compute the step; the tokens of all rows are evaluated together."""
        drawn: dict[int, tuple[mx.array, mx.array]] = {}
        for sequence in step.decode:
            drawn[sequence.sequence_id] = self._draw(sequence, self._forward(sequence, (sequence.last_id,)))
        for chunk in step.prefill:
            logits = self._forward(chunk.sequence, chunk.sequence.prompt_ids[chunk.start : chunk.end])
            if chunk.last:
                drawn[chunk.sequence.sequence_id] = self._draw(chunk.sequence, logits)
            else:
                # The keys and values alone: nobody reads these logits, so the vocabulary product is never computed.
                mx.eval([cache.state for cache in self.caches[chunk.sequence.sequence_id]])
        mx.eval(list(drawn.values()))
        tokens, failed = {}, {}
        for sequence_id, (token, broken) in drawn.items():
            if broken.item():
                failed[sequence_id] = "the model's logits are not numbers"
            else:
                tokens[sequence_id] = int(token.item())  # type: ignore[arg-type]  # an argmax is an integer
        return StepResult(tokens, failed)

    def release(self, sequence_id: int) -> None:
        """Free a row's keys and values."""
        if self.caches.pop(sequence_id, None) is not None and not self.caches:
            mx.clear_cache()

    def _forward(self, sequence: Sequence, ids: tuple[int, ...]) -> mx.array:
        """Feed `ids` to the row; its last position's logits: [vocab]."""
        cache = self.caches.get(sequence.sequence_id)
        if cache is None:
            cache = self.caches[sequence.sequence_id] = make_prompt_cache(self.model)
        logits: mx.array = self.model(mx.array([ids]), cache=cache)
        return logits[0, -1]

    def _draw(self, sequence: Sequence, logits: mx.array) -> tuple[mx.array, mx.array]:
        """The next token, and whether the logits are broken: MLX samples some id from NaN without a word."""
        return next_token(logits, sequence.params, len(sequence.output_ids)), mx.any(mx.isnan(logits))
