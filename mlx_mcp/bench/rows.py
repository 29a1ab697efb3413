"""How fast prompts are read and rows decode, beside mlx_lm's BatchGenerator in the same run."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from statistics import median

from mlx_mcp.bench.effort import Effort
from mlx_mcp.bench.report import Figure
from mlx_mcp.bench.sides import ROOM, Ours, Side, Subject, Theirs, wait
from mlx_mcp.core.prefill import CPU_PREFILL, Prefill

PASSES = (128, 512, 2048)  # tokens
EQUAL_ROWS = (1, 4, 16)
MIXED_ROWS = (4, 16)
EQUAL_TOKENS = 128
BLOCK = 5  # steps timed together


class Rows:
    """Measures rows of random tokens on both sides."""

    def __init__(self, subject: Subject, effort: Effort, context_tokens: int) -> None:
        self.subject, self.effort, self.context_tokens = subject, effort, context_tokens
        self.tokens_per_s = 1e9  # the slower side's speed of reading, which tells what a line will take
        self._random = random.Random(0)

    def prefill(self) -> Iterator[Figure]:
        """Read a prompt in passes of each length: tokens a second until the first token is there."""
        wished = min(self.effort.prompt_tokens, self.context_tokens - BLOCK)
        for _ in range(2):  # the first time kernels are compiled and buffers grow
            self._once(128, min(128, wished))
        for pass_tokens in PASSES:
            name = f"passes of {pass_tokens}"
            affordable = self._affordable()
            num_tokens = min(wished, max(128, affordable))
            why = self._why_not(num_tokens, num_tokens + ROOM)
            if why:
                yield Figure("prefill", name, None, "tokens/s", note=why)
                continue
            rounds = max(1, min(self.effort.prefills, affordable // num_tokens))
            taken = [self._once(pass_tokens, num_tokens) for _ in range(rounds)]
            ours, theirs = (num_tokens / median(times) for times in zip(*taken, strict=True))
            yield Figure("prefill", name, ours, "tokens/s", theirs, f"a prompt of {num_tokens} tokens")

    def decode(self) -> Iterator[Figure]:
        """Rows of one length, and of many: tokens a second, all rows together."""
        equal = min(EQUAL_TOKENS, self.context_tokens // 2)
        for num_rows in EQUAL_ROWS:
            name = "1 row" if num_rows == 1 else f"{num_rows} rows"
            yield self._decode(name, [equal] * num_rows, f"prompts of {equal} tokens")
        for num_rows in MIXED_ROWS:
            longest = min(self.effort.longest_row, self.context_tokens * 3 // 4)
            longest = min(longest, max(64, 2 * self._affordable() // num_rows))  # rows are half as long on average
            lengths = [20 + (longest - 20) * i // (num_rows - 1) for i in range(num_rows)]
            yield self._decode(f"{num_rows} rows, mixed", lengths, f"mixed: 20 to {longest} tokens")

    def _decode(self, name: str, lengths: list[int], note: str) -> Figure:
        # BatchGenerator gives each row the room of the longest.
        why = self._why_not(sum(lengths), len(lengths) * (max(lengths) + ROOM))
        if why:
            return Figure("decode", name, None, "tokens/s", note=why)
        ours, theirs = Ours(self.subject, self.subject.loaded.prefill or CPU_PREFILL), Theirs(self.subject, 2048)
        try:
            for side in (ours, theirs):
                self._fill(side, lengths)
            taken = self._in_turns(ours, theirs)
        finally:
            ours.close()
            theirs.close()
        return Figure("decode", name, len(lengths) / taken[0], "tokens/s", len(lengths) / taken[1], note)

    def _in_turns(self, ours: Side, theirs: Side) -> tuple[float, float]:
        """Median seconds of a step on each side: blocks of steps taken in turn, so that other load falls on both."""
        taken: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + self.effort.decode_s
        for i in range(self.effort.most_blocks + 1):
            for side, times in zip((ours, theirs), taken, strict=True):
                wait(ours, theirs)
                start = time.perf_counter()
                for _ in range(BLOCK):
                    side.step()
                wait(ours, theirs)
                if i:  # in the first ones buffers grow
                    times.append((time.perf_counter() - start) / BLOCK)
            if taken[0] and time.perf_counter() > end:
                break
        return median(taken[0]), median(taken[1])

    def _once(self, pass_tokens: int, num_tokens: int) -> tuple[float, float]:
        """Seconds until the first token of a prompt, on each side."""
        taken = []
        prefill = Prefill(pass_tokens, max(CPU_PREFILL.idle_tokens, pass_tokens), pass_tokens)
        for side in (Ours(self.subject, prefill), Theirs(self.subject, pass_tokens)):
            wait(side)
            start = time.perf_counter()
            try:
                self._fill(side, [num_tokens])
                wait(side)
            finally:
                side.close()
            taken.append(time.perf_counter() - start)
        self.tokens_per_s = num_tokens / max(taken)
        return taken[0], taken[1]

    def _fill(self, side: Side, lengths: list[int]) -> None:
        """Add rows of these prompt lengths, and step until all of them decode."""
        vocabulary = range(self.subject.loaded.vocab_size)
        rows = [side.add(self._random.choices(vocabulary, k=length)) for length in lengths]
        while not side.answered(rows):
            side.step()

    def _why_not(self, num_read: int, num_kept: int) -> str:
        """Why a line is left out that reads and keeps so many tokens on either side; empty where it is not."""
        needed = 2 * num_kept * self.subject.loaded.runner.cost.token_bytes
        if needed > self.subject.max_kv_bytes:
            return f"it needs {needed / 1e9:.1f} GB for keys and values of {self.subject.max_kv_bytes / 1e9:.1f} GB"
        taken = self.effort.most_s * num_read / self._affordable()
        return f"it would take {taken:.0f} s" if taken > 2 * self.effort.most_s else ""

    def _affordable(self) -> int:
        """How many tokens both sides can read in the time of one line."""
        return max(1, int(self.effort.most_s * self.tokens_per_s / 2))
