"""What answers took, in tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_mcp.api.openai.shared_shapes import CompletionDetails, PromptDetails, Usage
from mlx_mcp.chat.answer import TextKind
from mlx_mcp.service.values import Delta, Result


@dataclass
class Thinking:
    """Counts the tokens of one answer that were written while the model was thinking."""

    num_tokens: int = 0
    _num_seen: int = 0

    def take(self, delta: Delta) -> None:
        """Take what is new of the answer."""
        if delta.kind is TextKind.REASONING:
            self.num_tokens += delta.num_tokens - self._num_seen
        self._num_seen = delta.num_tokens


def reused(result: Result) -> int:
    """The prompt's tokens that were not computed."""
    return result.cached_tokens + result.restored_tokens


def usage_of(results: Sequence[Result], thinking: Sequence[Thinking], num_prompts: int = 1) -> Usage:
    """What several answers took together. Each prompt counts once, however many answers it has."""
    per_prompt = len(results) // num_prompts
    firsts = results[::per_prompt]
    num_prompt = sum(result.prompt_tokens for result in firsts)
    num_written = sum(result.completion_tokens for result in results)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_written,
        total_tokens=num_prompt + num_written,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(map(reused, firsts))),
        completion_tokens_details=CompletionDetails(reasoning_tokens=sum(each.num_tokens for each in thinking)),
    )
