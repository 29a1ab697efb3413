"""Reads blocks from the store for calls that wait, if that is faster than computing them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mlx_mcp.core.cache.manager import KvCacheManager
from mlx_mcp.core.cache.tiers import Wanted
from mlx_mcp.core.durable import Store
from mlx_mcp.core.layout import Payload
from mlx_mcp.core.ports import ModelRunner, StoredBlock
from mlx_mcp.core.sequence import Sequence
from mlx_mcp.engine.awaited import BlocksReading
from mlx_mcp.engine.call import Call, Calls
from mlx_mcp.engine.io_thread import Io
from mlx_mcp.engine.results import BlocksRead, RestoredBlock
from mlx_mcp.errors import MlxMcpError

logger = logging.getLogger(__name__)

SMOOTHING = 0.3  # the weight of the latest measurement
MEASURED_BYTES = 1 << 20  # a smaller reading measures the latency rather than the rate
MEASURED_TOKENS = 64


@dataclass
class Rate:
    """How fast something is, by the latest measurements."""

    per_s: float = 0.0

    def take(self, amount: float, seconds: float) -> None:
        """Take a measurement."""
        measured = amount / max(seconds, 1e-6)
        self.per_s = measured if not self.per_s else self.per_s + SMOOTHING * (measured - self.per_s)

    def seconds(self, amount: float) -> float:
        """How long this amount takes; 0 while nothing was measured."""
        return amount / self.per_s if self.per_s else 0.0


@dataclass(eq=False)
class Fetch:
    """Blocks that are being read, for the sequence that needed them first."""

    keys: frozenset[bytes]
    sequence: Sequence
    cache: KvCacheManager
    num_bytes: int
    started: float


class Restoring:
    """Fetches blocks from the store. Engine thread only."""

    def __init__(self, calls: Calls, io: Io, clock: Callable[[], float]) -> None:
        self.calls, self.io, self.clock = calls, io, clock
        self.store: Store | None = None  # once it has been opened
        self.fetches: dict[int, Fetch] = {}
        self.num_fetches = self.num_restored = self.num_recomputed = 0
        self.reading, self.prefilling = Rate(), Rate()  # bytes, tokens

    def begin(self, call: Call) -> None:
        """Have a call whose sequence waits wait for blocks in the store too, if reading these is faster."""
        sequence, resident = call.row
        cache, store = resident.scheduler.cache, self.store
        if store is None or cache is None:
            return
        wanted = cache.wanted(sequence, store.tier.find)
        if not wanted:
            return
        if not self._is_faster(wanted):
            cache.pass_over(sequence)
            return
        cache.fetch(sequence)
        number = next((number for number, fetch in self.fetches.items() if wanted[0].key in fetch.keys), None)
        if number is None:
            number = self._fetch(store, wanted, sequence, cache, resident.model.runner)
        self.calls.wait(call, BlocksReading(number))

    def on_blocks_read(self, result: BlocksRead) -> None:
        """Put blocks that were read into the trees, and wake the calls that waited for them."""
        fetch, outcome = self.fetches.pop(result.number), result.outcome
        if isinstance(outcome, MlxMcpError):
            logger.warning("blocks were not restored: %s", outcome)
            outcome = ()
        elif outcome and fetch.num_bytes >= MEASURED_BYTES:
            self.reading.take(fetch.num_bytes, self.clock() - fetch.started)
        blocks: list[tuple[StoredBlock, Payload]] = []
        try:
            blocks += [(each.block, each.payload()) for each in outcome]
        except Exception:  # MLX's; what does not come back is computed
            logger.exception("blocks were not restored")
        self.num_restored += len(blocks)
        woken = self.calls.wake(BlocksReading(result.number))
        # The first sequence may have ended by now; others may need its blocks all the same.
        fetch.cache.add_restored(fetch.sequence, blocks)
        for call in woken:
            sequence, resident = call.row
            if sequence is not fetch.sequence and resident.scheduler.cache is not None:
                resident.scheduler.cache.add_restored(sequence, [])
                self.begin(call)  # it may need more than the first did

    def measure_prefill(self, num_tokens: int, seconds: float) -> None:
        """Take the duration of a step that only read prompts."""
        if num_tokens >= MEASURED_TOKENS:
            self.prefilling.take(num_tokens, seconds)

    def _fetch(
        self, store: Store, wanted: list[Wanted], sequence: Sequence, cache: KvCacheManager, runner: ModelRunner
    ) -> int:
        """Begin to read blocks; returns the number of the fetch."""
        self.num_fetches += 1
        keys, num_bytes = [each.key for each in wanted], sum(each.entry.nbytes for each in wanted)
        self.fetches[self.num_fetches] = Fetch(frozenset(keys), sequence, cache, num_bytes, self.clock())

        def load() -> tuple[RestoredBlock, ...]:
            blocks: list[RestoredBlock] = []
            for block in store.tier.get(keys):
                try:
                    blocks.append(RestoredBlock(block, runner.unpack(block)))
                except ValueError:  # undamaged bytes of something else
                    break
            return tuple(blocks)

        self.io.submit(load, partial(BlocksRead, self.num_fetches), urgent=True)
        return self.num_fetches

    def _is_faster(self, wanted: list[Wanted]) -> bool:
        """Whether reading is faster than computing, by what was measured; true until both were measured."""
        num_tokens, num_bytes = wanted[-1].end - wanted[0].start, sum(each.entry.nbytes for each in wanted)
        loading_s, computing_s = self.reading.seconds(num_bytes), self.prefilling.seconds(num_tokens)
        pays = not loading_s or not computing_s or loading_s < computing_s
        self.num_recomputed += not pays
        return pays
