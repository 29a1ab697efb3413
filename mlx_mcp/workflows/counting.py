"""What a workflow has had of the models: one value that adds up the results of its calls. Knows no engine."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from mlx_mcp.service.values import Result


@dataclass(frozen=True)
class Counts:
    """How many calls there were, and how many tokens these had.

    Of the prompts' tokens, `cached_tokens` were in memory, `restored_tokens` came from disk, and `computed_tokens` were
    read by a model. `written_tokens` are those of the answers, thoughts included.
    """

    calls: int = 0
    failed: int = 0  # of these
    prompt_tokens: int = 0
    cached_tokens: int = 0
    restored_tokens: int = 0
    computed_tokens: int = 0
    written_tokens: int = 0

    @classmethod
    def of(cls, result: Result) -> Counts:
        """Those of one call that was answered."""
        computed = result.prompt_tokens - result.cached_tokens - result.restored_tokens
        return cls(
            1,
            0,
            result.prompt_tokens,
            result.cached_tokens,
            result.restored_tokens,
            computed,
            result.completion_tokens,
        )

    def __add__(self, other: Counts) -> Counts:
        """Those of both."""
        return Counts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def spent_tokens(self) -> int:
        """The tokens that models worked on: read and written."""
        return self.computed_tokens + self.written_tokens


FAILED = Counts(calls=1, failed=1)
