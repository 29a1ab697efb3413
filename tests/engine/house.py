"""An engine over fakes, stepped by hand and looked into: a token is a letter, and takes one byte."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_mcp.core.cache.blocks import BlockPool
from mlx_mcp.core.cache.misses import Miss
from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.layout import Layout
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.session import SessionInfo, SessionOptions
from mlx_mcp.core.slots import KvCost
from mlx_mcp.engine.engine import Engine, EngineOptions
from mlx_mcp.engine.messages import (
    Event,
    Failed,
    Finished,
    Fork,
    Load,
    Prefilled,
    Sessions,
    Submit,
    Token,
    Turn,
)
from mlx_mcp.engine.persistence import Persisting
from mlx_mcp.errors import MlxMcpError
from tests.engine.hearing import hear
from tests.fakes import FakeLoader, FakeRunner

KEEP = SessionOptions()


class House:
    """An engine with one model, blocks of 4 tokens and chunks of 8, and a clock that stands."""

    def __init__(
        self,
        max_kv_bytes: int = 1 << 30,
        layout: Layout | None = None,
        context_tokens: int = 100_000,
        limits: dict[str, Any] | None = None,
        cost: KvCost | None = None,
        hash_bytes: int = 32,
        persisting: Persisting | None = None,
        **keeping: Any,
    ) -> None:
        self.now, self.ids = 0.0, itertools.count(1)
        self.runner = FakeRunner(layout=layout or Layout(sharing=True), cost=cost or KvCost(token_bytes=1))
        loader = FakeLoader(self.runner, context_tokens=context_tokens)
        its_limits = replace(Limits(chunk_tokens=8, prefill_tokens_idle=16, prefill_tokens_busy=8), **(limits or {}))
        its_keeping = replace(EngineOptions(block_tokens=4, sharing=Sharing(0, 0)), **keeping)
        self.engine = Engine(loader, its_limits, 150, max_kv_bytes, its_keeping, lambda: self.now, persisting)
        self.engine.models.cache = replace(self.engine.cache, hash_bytes=hash_bytes)
        self.load("tiny")

    def load(self, name: str) -> None:
        spec = ModelSpec(name, "folder", "/nowhere")
        self.engine.handle(Load(next(self.ids), self.engine.loader.prepare(spec, lambda line: None)))
        for _ in range(3):
            self.engine.step()

    def say(
        self,
        text: str,
        session: str = "",
        keep: bool = True,
        after: str = "assistant",
        model: str = "tiny",
        max_tokens: int = 60,
        **turn: Any,
    ) -> "Events":
        """Submit a call; its events come in the list that is returned."""
        events = Events(next(self.ids))
        its_turn = replace(Turn("ann", session, after, keep and bool(session)), **turn)
        params = SamplingParams(max_tokens)
        prompt = tuple(map(ord, text))
        hear(self.engine, events, events.sequence_id)
        self.engine.handle(Submit(events.sequence_id, model, prompt, params, turn=its_turn))
        return events

    def open(self, text: str, **options: Any) -> str:
        events = self.say(text, opens=SessionOptions(**options))
        self.run()
        return events.session

    def prime(self, text: str, **options: Any) -> str:
        events = self.say(text, opens=SessionOptions(**options), context="user", max_tokens=1)
        self.run()
        return events.session

    def ask(self, command: Callable[..., Any], *arguments: Any) -> tuple[SessionInfo, ...]:
        heard = Events(next(self.ids))
        self.engine.handle(command(hear(self.engine, heard, heard.sequence_id), *arguments))
        if isinstance(heard[0], Failed):
            raise heard[0].error
        assert isinstance(heard[0], Sessions)
        return heard[0].infos

    def fork(self, session: str, count: int = 1, names: tuple[str, ...] = (), tenant: str = "ann") -> list[str]:
        return [info.session_id for info in self.ask(Fork, tenant, session, count, names)]

    def run(self, steps: int = 2000) -> None:
        for _ in range(steps):
            if not self.engine.has_work:
                break
            self.engine.step()
            self.engine.check_integrity()
        else:
            raise AssertionError("it never ends")

    def log(self, session: str) -> str:
        return "".join(map(chr, self.engine.sessions.sessions[session].log))

    @property
    def pool(self) -> BlockPool:
        return self.engine.cache.pool


class Events(list[Event]):
    def __init__(self, sequence_id: int) -> None:
        super().__init__()
        self.sequence_id = sequence_id

    def __call__(self, event: Event) -> bool:
        self.append(event)
        return True

    @property
    def text(self) -> str:
        return "".join(chr(e.token_id) for e in self if isinstance(e, Token))

    @property
    def ended(self) -> bool:
        return bool(self) and isinstance(self[-1], Finished | Failed)

    @property
    def session(self) -> str:
        last = self[-1]
        assert isinstance(last, Finished), last
        assert last.session is not None
        return last.session.session_id

    @property
    def cached(self) -> int:
        return next(e.num_cached for e in self if isinstance(e, Prefilled))

    @property
    def miss(self) -> Miss | None:
        return next(e.miss for e in self if isinstance(e, Prefilled))

    @property
    def error(self) -> MlxMcpError:
        last = self[-1]
        assert isinstance(last, Failed), last
        return last.error


def words(n: int, first: str = "a") -> str:
    """n letters that do not repeat in blocks."""
    return "".join(chr(ord(first) + (i * i // 3 + i) % 23) for i in range(n))
