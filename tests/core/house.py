"""One model's sequences, sessions and blocks without an engine, stepped by hand: a token takes one byte."""

from functools import partial
from typing import Any

from mlx_mcp.core.cache.blocks import BlockPool
from mlx_mcp.core.cache.manager import KvCacheManager
from mlx_mcp.core.cache.prefixes import PrefixCache
from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.layout import Layout
from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.core.session import Session, SessionOptions, SessionStore
from mlx_mcp.core.slots import KvCost, Ledger, SlotPool
from mlx_mcp.core.steps import Step
from tests.fakes import STOP_ID, FakeRunner

LIMITS = Limits(max_running=4, chunk_tokens=8, prefill_tokens_idle=16, prefill_tokens_busy=8)


class House:
    """Blocks of 4 tokens, chunks of 8, and a clock that stands.

    `with_model` gives another model's house on the same blocks. The runner fails where a row begins with tokens that
    are not its own, and every step ends with a proof that each reference and byte is somebody's.
    """

    def __init__(
        self,
        limit_bytes: int = 1 << 30,
        layout: Layout | None = None,
        sharing: Sharing | None = None,
        limits: Limits = LIMITS,
        hash_bytes: int = 32,
    ) -> None:
        self.now, self.number = 0.0, 0
        self.turns: dict[Sequence, Session] = {}
        self.layout, self.sharing, self.limits = layout or Layout(sharing=True), sharing or Sharing(0, 0), limits
        self.ledger = Ledger(limit_bytes)
        self.prefixes = PrefixCache(BlockPool(self.ledger, 4), hash_bytes)
        self.store = SessionStore(self.pool, lambda: self.now, max_sessions=100, ttl_s=60)
        self._add_model(b"tiny")

    def _add_model(self, fingerprint: bytes, chunk_tokens: int = 8) -> None:
        self.runner = FakeRunner(layout=self.layout)
        slots = SlotPool(self.ledger, KvCost(token_bytes=1))
        self.cache = KvCacheManager(self.prefixes, slots, self.layout, fingerprint, chunk_tokens, self.sharing)
        self.scheduler = Scheduler(self.limits, slots, self.cache)

    def with_model(self, fingerprint: bytes, chunk_tokens: int = 8) -> None:
        """Go on with another model, now that nothing runs."""
        assert not self.scheduler.has_work
        self._add_model(fingerprint, chunk_tokens)

    @property
    def pool(self) -> BlockPool:
        return self.prefixes.pool

    def add(self, text: str, tenant: str = "ann", max_tokens: int = 3, **fields: Any) -> Sequence:
        self.number += 1
        prompt, params = tuple(map(ord, text)), SamplingParams(max_tokens)
        s = Sequence(self.number, prompt, params, frozenset({STOP_ID}), str(self.number), tenant, **fields)
        self.scheduler.add(s)
        return s

    def step(self) -> Step:
        step = self.scheduler.schedule()
        self.check()
        live = {s.sequence_id: s for s in self.scheduler.running}
        result = self.runner.launch(step).collect()
        for sequence_id, logits in result.logits.items():
            self.cache.remember(live[sequence_id], logits)
        for sequence_id in self.scheduler.commit(step, result.tokens, result.payloads):
            self.keep(live[sequence_id])
            self.scheduler.remove(live[sequence_id])
            self.runner.release(sequence_id)
        self.check()
        assert not self.cache.references, "a step that was computed needs no block any more"
        return step

    def keep(self, sequence: Sequence) -> None:
        """What is left of a sequence becomes blocks, from which its session goes on."""
        leaf = self.cache.finish(sequence, partial(self.runner.cut, sequence.sequence_id))
        session = self.turns.pop(sequence, None)
        if session is not None:
            self.store.finish(session, sequence.tokens(0, sequence.num_tokens), leaf, "assistant")

    def run(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("it never ends")

    def say(self, text: str, tenant: str = "ann", **fields: Any) -> Sequence:
        """One call from beginning to end."""
        s = self.add(text, tenant, **fields)
        self.run()
        return s

    def begin(self, text: str, tenant: str = "ann", max_tokens: int = 3, **options: Any) -> Session:
        """The first turn of a session."""
        s = self.add(text, tenant, max_tokens, ephemeral=options.get("ephemeral", False))
        self.turns[s] = self.store.open(tenant, "tiny", SessionOptions(**options), (), s.sequence_id)
        return self.turns[s]

    def open(self, text: str, tenant: str = "ann", **options: Any) -> Session:
        """A session whose first turn said that."""
        session = self.begin(text, tenant, **options)
        self.run()
        return session

    def remove(self, sequence: Sequence) -> None:
        session = self.turns.pop(sequence, None)
        if session is not None:
            self.store.abandon(session)
        self.scheduler.remove(sequence)
        self.runner.release(sequence.sequence_id)
        self.check()

    def check(self) -> None:
        """Every reference and every byte is somebody's, and nobody has more."""
        self.scheduler.check_integrity()
        self.store.check_integrity()
        self.pool.check_integrity([*self.store.references, *self.cache.references])
        slots = self.scheduler.pool
        self.ledger.check_integrity(self.pool.used_bytes + slots.used_bytes + self.cache.booked_bytes)


def words(n: int, first: str = "a") -> str:
    """n letters that do not repeat in blocks."""
    return "".join(chr(ord(first) + (i * i // 3 + i) % 23) for i in range(n))
