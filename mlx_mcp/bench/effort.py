"""How long `mlx-mcp bench` looks. Does not import MLX, before which OpenBLAS has to be put in front."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How long to look: lengths in tokens, time in seconds."""

    prompt_tokens: int = 2048
    longest_row: int = 900
    prefills: int = 3
    most_blocks: int = 30
    decode_s: float = 6.0  # for the blocks of one line
    most_s: float = 25.0  # a line that would take longer is left out
    samples: int = 3  # of each time to the first token
    call_tokens: int = 1024  # the prompts of calls
    calls: int = 8  # of a fan-out


QUICK = Effort(256, 200, 1, 2, 0.2, 60.0, 1, 128)
