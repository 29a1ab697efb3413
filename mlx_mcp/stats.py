"""Frozen snapshots of what the engine does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    cache_bytes: int = 0  # of cached blocks
    cache_pinned_bytes: int = 0  # of these cannot be evicted now
    cache_blocks: int = 0
    evictions: int = 0  # blocks, since the start
    prompt_tokens: int = 0  # of all calls, since the start
    cached_tokens: int = 0  # of these were in the cache
    sessions: int = 0
    groups: Mapping[str, int] = field(default_factory=dict)  # of the running ones, by group of callers
    models: tuple[str, ...] = ()  # in memory, least recently used first
    of_models: Mapping[str, ModelStats] = field(default_factory=dict)  # of these
    loading: tuple[str, ...] = ()  # models whose weights are being read
    awaited: tuple[str, ...] = ()  # models that wait for room, the next one first
    weights_bytes: int = 0
    max_weights_bytes: int = 0
    max_kv_bytes: int = 0  # where there is one ceiling for all memory, it follows loads and unloads
    max_memory_bytes: int | None = None  # that ceiling; None where there is none
    storage: str = "off"  # "ok", or why nothing can be kept on disk now
    offloaded: int = 0  # evicted blocks that were written, since the start
    dropped: int = 0  # evicted blocks that were not, since too much was on its way
    restored: int = 0  # blocks that came back
