"""Chooses how many tokens of prompts a step computes: by the device, by what a user has set, by the time steps take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prefill:
    """How prompts are read. See Limits of the scheduler, which has the same fields."""

    chunk_tokens: int
    idle_tokens: int  # per step, while nothing decodes
    busy_tokens: int  # per step, while something decodes; with `wait_s`, what it begins with
    wait_s: float | None = None  # how long the tokens of those that decode may wait; None: `busy_tokens` stays


# On CPUs larger chunks were measured to be no faster. A GPU reads a model's weights once for each pass, and
# needs hundreds of tokens to be busy meanwhile; mlx_lm computes 2048 at once.
CPU_PREFILL = Prefill(128, 512, 128)
GPU_PREFILL = Prefill(512, 2048, 512, wait_s=0.15)


@dataclass(frozen=True)
class PrefillOptions:
    """What a user has set; None is as the device likes it."""

    chunk_tokens: int | None = None
    idle_tokens: int | None = None
    busy_tokens: int | None = None
    wait_s: float = 0.15

    def on(self, device: Prefill) -> Prefill:
        """What is in force where a device likes `device`. No budget is below a chunk.

        A budget that was set, and is smaller than the device's chunks, makes these smaller.
        """
        budgets = [tokens for tokens in (self.idle_tokens, self.busy_tokens) if tokens is not None]
        large = all(tokens >= device.chunk_tokens for tokens in budgets)
        chunk_tokens = self.chunk_tokens or (device.chunk_tokens if large else CPU_PREFILL.chunk_tokens)
        timed = device.wait_s is not None and self.busy_tokens is None
        return Prefill(
            chunk_tokens,
            self.idle_tokens or max(device.idle_tokens, chunk_tokens),
            self.busy_tokens or (chunk_tokens if timed else max(device.busy_tokens, chunk_tokens)),
            self.wait_s if timed else None,
        )


class PrefillBudget:
    """How many tokens of prompts a step computes in which others decode, so that these wait for `wait_s` at most.

    It follows the time that such steps take, between one chunk and `most_tokens`: at once to fewer, to more by doubling.
    A single chunk may take longer than that; it is never split. Without `wait_s` it stays as it is.
    """

    def __init__(self, tokens: int, chunk_tokens: int, most_tokens: int, wait_s: float | None) -> None:
        self.tokens, self.chunk_tokens = tokens, chunk_tokens
        self.most_tokens, self.wait_s = most_tokens, wait_s

    def measure(self, num_tokens: int, seconds: float) -> None:
        """Take the time of a step that computed so many tokens of prompts beside decoding rows."""
        if self.wait_s is None or seconds <= 0:
            return
        # As many as would have taken just that long. What decoding takes is in it, so this comes nearer step by step.
        fitting = num_tokens * self.wait_s / seconds
        if seconds <= self.wait_s:
            if 2 * num_tokens <= self.tokens:  # too few to tell how long many would take
                return
            fitting = max(self.tokens, min(fitting, 2 * self.tokens))
        whole = int(fitting) // self.chunk_tokens * self.chunk_tokens
        self.tokens = max(self.chunk_tokens, min(whole, self.most_tokens))
