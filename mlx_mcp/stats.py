"""Snapshots of what the engine does, and the histograms that go into them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Upper bounds, in seconds: of what takes a step, of what callers wait for, and of what may take minutes.
STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WAIT_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
LONG_BOUNDS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
BATCH_BOUNDS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Distribution:
    """How many values there were up to each bound and above the one before; the last count is of those above all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0  # of all values


class Histogram:
    """Counts values by their size. One thread observes; snapshots may go to any other."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._snapshot: Distribution | None = None

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        self._snapshot = None

    @property
    def snapshot(self) -> Distribution:
        """The counts as they are now."""
        if self._snapshot is None:
            self._snapshot = Distribution(self._bounds, tuple(self._counts), self._total)
        return self._snapshot


def empty(bounds: Sequence[float]) -> Distribution:
    """A distribution of no values."""
    return Distribution(tuple(bounds), (0,) * (len(bounds) + 1))


@dataclass(frozen=True)
class ModelStats:
    """A model in memory at one step boundary."""

    weights_bytes: int
    kv_token_bytes: int  # what a further token of a call takes, in layers that keep every token
    idle_s: float  # since a call last used it
    calls: int  # that run on it, or wait for it to run them
    pinned: bool


@dataclass(frozen=True)
class EngineStats:
    """Counts at one step boundary."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    preemptions: int = 0  # sequences that gave way, since the start
    rows: int = 0  # rows that hold keys and values
    kv_bytes: int = 0  # what these take
    kv_reserved_bytes: int = 0  # what is set aside for them; with cache_bytes never above max_kv_bytes
    max_kv_bytes: int = 0  # where there is one ceiling for all memory, it follows loads and unloads
    cache_bytes: int = 0  # of cached blocks
    cache_pinned_bytes: int = 0  # of these cannot be evicted now
    cache_blocks: int = 0
    evictions: int = 0  # blocks, since the start
    prompt_tokens: int = 0  # of all calls, since the start
    cached_tokens: int = 0  # of these were in the cache
    restored_tokens: int = 0  # of these a tier brought for the call
    computed_tokens: int = 0  # of prompts, in chunks; those of calls that were preempted or cancelled too
    output_tokens: int = 0  # that were drawn, since the start
    sessions: int = 0
    groups: Mapping[str, int] = field(default_factory=dict)  # of the running ones, by group of callers
    models: tuple[str, ...] = ()  # in memory, least recently used first
    of_models: Mapping[str, ModelStats] = field(default_factory=dict)  # of these
    loading: tuple[str, ...] = ()  # models whose weights are being read
    awaited: tuple[str, ...] = ()  # models that wait for room, the next one first
    loads: int = 0  # models whose weights were read, since the start
    unloads: int = 0  # models whose weights went
    swaps: int = 0  # of these made room for another
    weights_bytes: int = 0
    max_weights_bytes: int = 0
    max_memory_bytes: int | None = None  # that ceiling; None where there is none
    storage: str = "off"  # "ok", or why nothing can be kept on disk now
    opening: bool = False  # whether the sessions on disk are still being looked for
    pending_bytes: int = 0  # of evicted blocks that are being written
    offloaded: int = 0  # evicted blocks that were written, since the start
    dropped: int = 0  # evicted blocks that were not, since too much was on its way
    restored: int = 0  # blocks that came back
    disk_bytes: int = 0  # of blocks on disk
    disk_evictions: int = 0  # blocks that the quota removed there, since the start
    persists: int = 0  # sessions that were written, since the start
    persist_failures: int = 0  # sessions that could not be written
    # Since the start; left out of comparisons, as they tell how long things took.
    batch_rows: Distribution = field(default_factory=lambda: empty(BATCH_BOUNDS), compare=False)  # rows a step
    queue_s: Distribution = field(default_factory=lambda: empty(WAIT_BOUNDS_S), compare=False)  # arrival to first step
    load_s: Distribution = field(default_factory=lambda: empty(LONG_BOUNDS_S), compare=False)  # reading of weights
    persist_s: Distribution = field(default_factory=lambda: empty(LONG_BOUNDS_S), compare=False)  # of one session
