"""Frozen snapshots of what the engine does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counts at one step boundary."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    rows: int = 0  # rows that hold keys and values
    models: tuple[str, ...] = ()  # in memory, least recently used first
    weights_bytes: int = 0
