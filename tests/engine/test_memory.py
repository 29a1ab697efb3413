"""One ceiling for all memory: the limit of keys and values follows loads and unloads, and loads wait for rows."""

import itertools
from dataclasses import dataclass, replace

import pytest

from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.memory import Budget
from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.slots import KvCost
from mlx_mcp.engine.engine import Engine, EngineOptions
from mlx_mcp.engine.messages import Failed, Finished, Load, Loaded, Submit, Unload
from mlx_mcp.errors import ModelError
from tests.fakes import FakeLoader, FakeRunner

CEILING = Budget(max_weights_bytes=8000, max_kv_bytes=None, ceiling_bytes=10_000, cache_bytes=500, max_blocks=20)


@dataclass
class Loader(FakeLoader):
    """Gives each model a runner of its own; a model's name says what its weights take."""

    token_bytes: int = 1

    def prepare(self, spec, report):
        weights = int(spec.name)
        prepared = super().prepare(spec, report)
        return replace(prepared, weights_bytes=weights, pass_bytes=100, budget=CEILING)

    def materialise(self, prepared):
        self.runner = FakeRunner(cost=KvCost(token_bytes=self.token_bytes))
        return (yield from super().materialise(prepared))


class House:
    """An engine, and what each call was told."""

    def __init__(self, **loader):
        self.now, self.ids, self.told = 0.0, itertools.count(1), {}
        self.loader = Loader(context_tokens=100_000, **loader)
        limits = Limits(chunk_tokens=64, prefill_tokens_idle=64, prefill_tokens_busy=64)
        options = EngineOptions(block_tokens=16, sharing=Sharing(0, 0))
        self.engine = Engine(self.loader, limits, 150, 1 << 30, options, lambda: self.now)
        self.engine.tell(lambda call_id, event: self.told.setdefault(call_id, []).append(event) or True)

    def load(self, name):
        prepared, call_id = (
            self.loader.prepare(ModelSpec(name, "folder", "/nowhere"), lambda line: None),
            next(self.ids),
        )
        self.engine.handle(Load(call_id, prepared))
        return call_id

    def say(self, model, num_tokens, max_tokens):
        call_id = next(self.ids)
        self.engine.handle(
            Submit(
                call_id, model, tuple(97 + (i * num_tokens) % 23 for i in range(num_tokens)), SamplingParams(max_tokens)
            )
        )
        return call_id

    def step(self, num=5):
        for _ in range(num):
            self.engine.step()
            self.engine.check_integrity()

    def last(self, call_id):
        return self.told[call_id][-1]


def test_keys_and_values_have_what_is_left_and_it_follows_loads_and_unloads():
    house = House()
    for name, left in (("1000", 8400), ("2000", 6300)):
        house.load(name)
        assert house.engine.ledger.limit_bytes == left  # from the moment on in which the weights are read
        house.step()
        assert house.engine.stats.max_kv_bytes == left
    house.engine.handle(Unload(next(house.ids), "1000"))
    assert house.engine.ledger.limit_bytes == 7400
    assert house.engine.stats.max_memory_bytes == 10_000


def test_a_model_is_loaded_only_when_rows_have_left_it_room():
    house = House()
    house.load("1000")
    house.step()
    long = house.say("1000", 100, 6000)
    house.step(3)
    waits = house.load("5000")
    house.step(20)
    assert not isinstance(house.last(waits), Loaded)  # 3300 would be left, and the call may need 6100
    assert house.engine.models.loads == {}
    while not isinstance(house.last(long), Finished):
        house.step(50)
    house.step()
    assert isinstance(house.last(waits), Loaded)
    assert house.engine.ledger.limit_bytes == 3300


def test_cached_blocks_go_for_the_weights_of_another_model():
    house = House()
    house.load("1000")
    house.step()
    for n in range(3):
        house.say("1000", 200 + n, 3)
        house.step(30)
    before = house.engine.cache.pool.num_blocks
    house.load("7800")
    house.step()
    assert list(house.engine.models.by_name) == ["7800"]  # the other one had to go
    assert house.engine.ledger.used_bytes <= house.engine.ledger.limit_bytes == 1600
    assert before > 0


def test_a_device_that_can_have_few_arrays_keeps_few_blocks():
    house = House()
    house.load("1000")
    house.step()
    for n in range(6):
        house.say("1000", 130 + n, 3)
        house.step(30)
        assert house.engine.cache.pool.num_blocks <= 20
    assert house.engine.stats.evictions > 0


def test_a_model_too_large_for_the_ceiling_is_refused_with_what_would_fit():
    house = House()
    refused = house.load("12000")
    error = house.last(refused).error
    assert isinstance(error, ModelError)
    assert "for a pass of a prompt" in str(error)
    assert "The same model in 8 bits takes about" in str(error)


@pytest.mark.parametrize(("token_bytes", "fits"), [(1, True), (16, False)])
def test_a_model_whose_weights_leave_no_room_for_tokens_is_refused(token_bytes, fits):
    house = House(token_bytes=token_bytes)
    loaded = house.load("7000")  # 2400 are left
    house.step()
    if fits:
        assert isinstance(house.last(loaded), Loaded)
    else:
        assert isinstance(house.last(loaded), Failed)
        assert "has no room for a prompt" in str(house.last(loaded).error)
        assert house.engine.ledger.limit_bytes == 9500
