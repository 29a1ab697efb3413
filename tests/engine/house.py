"""An engine over fakes, stepped by hand and looked into: a token is a letter, and takes one byte."""

import itertools
from dataclasses import replace

from mlx_mcp.core.kv_cache_manager import Sharing
from mlx_mcp.core.layout import Layout
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.session import SessionOptions
from mlx_mcp.core.slots import KvCost
from mlx_mcp.engine.engine import Engine, Keeping
from mlx_mcp.engine.messages import Failed, Finished, Fork, Load, Moved, Prefilled, Submit, Token, Turn
from tests.fakes import FakeLoader, FakeRunner

KEEP = SessionOptions()


class House:
    """An engine with one model, blocks of 4 tokens and chunks of 8, and a clock that stands."""

    def __init__(
        self,
        max_kv_bytes=1 << 30,
        layout=None,
        context_tokens=100_000,
        limits=None,
        cost=None,
        hash_bytes=32,
        persisting=None,
        **keeping,
    ):
        self.now, self.ids = 0.0, itertools.count(1)
        self.runner = FakeRunner(layout=layout or Layout(sharing=True), cost=cost or KvCost(token_bytes=1))
        loader = FakeLoader(self.runner, context_tokens=context_tokens)
        limits = Limits(**{"chunk_tokens": 8, "prefill_tokens_idle": 16, "prefill_tokens_busy": 8} | (limits or {}))
        keeping = Keeping(**{"block_tokens": 4, "sharing": Sharing(0, 0)} | keeping)
        self.engine = Engine(loader, limits, 150, max_kv_bytes, keeping, lambda: self.now, persisting)
        self.engine.cache = replace(self.engine.cache, hash_bytes=hash_bytes)
        self.load("tiny")

    def load(self, name):
        spec = ModelSpec(name, "folder", "/nowhere")
        self.engine.handle(Load(self.engine.loader.prepare(spec, lambda line: None), lambda event: True))
        for _ in range(3):
            self.engine.step()

    def say(self, text, session="", keep=True, after="assistant", model="tiny", max_tokens=60, **turn):
        """Submit a call; its events come in the list that is returned."""
        events = Events(next(self.ids))
        turn = Turn(**{"tenant": "ann", "session": session, "after": after, "keep": keep and bool(session)} | turn)
        params = SamplingParams(max_tokens)
        prompt = tuple(map(ord, text))
        self.engine.handle(Submit(events.sequence_id, model, prompt, params, events, turn=turn))
        return events

    def open(self, text, **options):
        events = self.say(text, opens=SessionOptions(**options))
        self.run()
        return events.session

    def prime(self, text, **options):
        events = self.say(text, opens=SessionOptions(**options), context="user", max_tokens=1)
        self.run()
        return events.session

    def ask(self, command, *arguments):
        heard = []
        self.engine.handle(command(*arguments, lambda event: heard.append(event) or True))
        if isinstance(heard[0], Failed):
            raise heard[0].error
        return heard[0].infos

    def fork(self, session, count=1, names=(), tenant="ann"):
        return [info.session_id for info in self.ask(Fork, tenant, session, count, names)]

    def run(self, steps=2000):
        for _ in range(steps):
            if not self.engine.has_work:
                break
            self.engine.step()
            self.engine.check_integrity()
        else:
            raise AssertionError("it never ends")

    def log(self, session):
        return "".join(map(chr, self.engine.sessions.sessions[session].log))

    @property
    def pool(self):
        return self.engine.cache.pool


class Events(list):
    def __init__(self, sequence_id):
        super().__init__()
        self.sequence_id = sequence_id

    def __call__(self, event):
        self.append(event)
        return True

    @property
    def text(self):
        return "".join(chr(e.token_id) for e in self if isinstance(e, Token))

    @property
    def ended(self):
        return bool(self) and isinstance(self[-1], Finished | Failed | Moved)

    @property
    def session(self):
        assert isinstance(self[-1], Finished), self[-1]
        return self[-1].session.session_id

    @property
    def cached(self):
        return next(e.num_cached for e in self if isinstance(e, Prefilled))

    @property
    def miss(self):
        return next(e.miss for e in self if isinstance(e, Prefilled))

    @property
    def error(self):
        assert isinstance(self[-1], Failed), self[-1]
        return self[-1].error


def words(n, first="a"):
    """n letters that do not repeat in blocks."""
    return "".join(chr(ord(first) + (i * i // 3 + i) % 23) for i in range(n))
