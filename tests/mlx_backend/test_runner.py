"""Rows of a batch against the same rows alone, bit by bit: the wheel's BLAS does not mind how many rows there are."""

import random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.core.slots import Ledger, SlotPool
from mlx_mcp.errors import ModelError
from mlx_mcp.mlx_backend import runner as runner_module
from mlx_mcp.mlx_backend.runner import Runner
from mlx_mcp.mlx_backend.slabs import FullLayer
from tests.comparing import assert_same, assert_same_answer, num_same, quantized
from tests.effort import THOROUGH, drawn, rare_ones_slow
from tests.mlx_backend.test_architectures import build
from tests.models_made import ARCHITECTURES, make_model

pytestmark = pytest.mark.usefixtures("kernels")
LIMITS = Limits(max_running=6, chunk_tokens=16, prefill_tokens_idle=32, prefill_tokens_busy=16)
# name → architecture, kv_bits, bound on logits of a row that was computed again after it was preempted.
# mamba2 scans a chunk in another order than single tokens, gemma3's ring lies otherwise in memory after it turned, and
# deepseek_v3 attends to a chunk by another product than to a token.
KINDS = {
    "llama": ("llama", None, 0.0),
    "llama, 8 bits": ("llama", 8, 0.0),
    "llama, 4 bits": ("llama", 4, 0.0),
    "gemma3": ("gemma3", None, 1e-4),
    "qwen3_next": ("qwen3_next", None, 0.0),
    "mamba2": ("mamba2", None, 1e-4),
    "deepseek_v3, padded": ("deepseek_v3", None, 1e-4),
    "gemma2, row by row": ("gemma2", None, 0.0),
}
# prompt tokens, max_tokens, temperature: lengths on both sides of chunks, slots (128) and gemma3's window (64)
ROWS = [(3, 30, 0.0), (16, 12, 1.0), (33, 50, 0.0), (64, 8, 0.7), (90, 45, 0.0), (120, 25, 1.0), (150, 20, 0.0)]


# One of each way of keeping keys and values; the others are slow.
USUAL = ("llama", "llama, 8 bits", "gemma3", "qwen3_next", "deepseek_v3, padded")


@pytest.fixture(scope="module", params=rare_ones_slow(KINDS, USUAL))
def kind(request, tmp_path_factory):
    architecture, kv_bits, bound = KINDS[request.param]
    if architecture not in ARCHITECTURES:
        return build(architecture), kv_bits, bound
    heads = {"head_dim": 32} if kv_bits else {}
    model, _ = load_model(make_model(tmp_path_factory.mktemp("model"), architecture, **heads))
    return model, kv_bits, bound


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_model(make_model(tmp_path_factory.mktemp("model")))[0]


def prompt(index, num_tokens):
    return tuple((31 * index + 7 * i + i * i) % 300 for i in range(num_tokens))


def sequence(index, num_tokens, max_tokens=12, session="", **params):
    return Sequence(index, prompt(index, num_tokens), SamplingParams(max_tokens, **params), frozenset(), session)


class Machine:
    """A runner and its scheduler, stepped by hand; `logits` keeps what every token was drawn from."""

    def __init__(self, model, kv_bits=None, limit_bytes=1 << 40, limits=LIMITS):
        self.kv_bits, self.runner = kv_bits, Runner(model, kv_bits, limits.chunk_tokens)
        self.scheduler = Scheduler(limits, SlotPool(Ledger(limit_bytes), self.runner.cost))
        self.logits, self.failed, self.again = {}, {}, set()
        self.step = self.flight = None

    def advance(self, ahead=True):
        if self.flight is None:
            self.step = self.scheduler.schedule()
            self.again |= set(self.step.released)
            self.flight = self.launch(self.step)
        step, flight = self.step, self.flight
        self.step = self.flight = None
        if ahead and not any(self.runner.must_wait(i) for i in step.drawing):
            self.step = self.scheduler.schedule_ahead(step)
            self.flight = self.launch(self.step) if self.step else None
        result = flight.collect()
        self.failed |= result.failed
        running = {s.sequence_id: s for s in self.scheduler.running}
        for sequence_id in result.failed.keys() & running.keys():
            self.cancel(running[sequence_id])
        for sequence_id in self.scheduler.commit(step, result.tokens):
            self.cancel(running[sequence_id])
        self.scheduler.check_integrity()

    def launch(self, step):
        drawn, original = [], runner_module.draw

        def draw(logits, rows, *rest):
            drawn.append(logits)
            return original(logits, rows, *rest)

        runner_module.draw = draw
        try:
            flight = self.runner.launch(step)
        finally:
            runner_module.draw = original
        for (rows, _), logits in zip(flight.drawn, drawn, strict=True):
            for row, its_logits in zip(rows, logits, strict=True):
                index = self.runner.rows.lengths[row.sequence_id] - len(row.prompt_ids)
                self.logits[row.sequence_id, index] = its_logits
        return flight

    def cancel(self, s):
        self.scheduler.remove(s)
        self.runner.release(s.sequence_id)

    def drop_all(self):
        """What the engine does after an exception."""
        self.again |= {s.sequence_id for s in self.scheduler.running}
        self.scheduler.preempt_all()
        self.runner.reset()
        self.step = self.flight = None

    def run(self, sequences):
        for s in sequences:
            self.scheduler.add(s)
        while self.scheduler.has_work or self.flight:
            self.advance()
        assert self.runner.num_rows == self.runner.kv_bytes == self.scheduler.pool.ledger.used_bytes == 0
        return [s.output_ids for s in sequences]


def rows():
    return [sequence(i, n, most, str(i % 3), temperature=t, seed=i) for i, (n, most, t) in enumerate(ROWS)]


@pytest.fixture(scope="module")
def alone(kind):
    """Tokens and logits of each of ROWS by itself."""
    model, kv_bits, _ = kind
    found = []
    for s in rows():
        machine = Machine(model, kv_bits)
        machine.run([s])
        found.append((s.output_ids, [np.array(machine.logits[s.sequence_id, i]) for i in range(len(s.output_ids))]))
    return found


def assert_as_alone(alone, bound, machine, sequences):
    for s in sequences:
        tokens, logits = alone[s.sequence_id]
        allowed = max(bound if s.sequence_id in machine.again else 0.0, quantized(machine.kv_bits))
        if quantized(machine.kv_bits) and s.params.temperature:  # a draw ends elsewhere where the logits differ
            same = min(num_same(s.output_ids, tokens) + 1, len(s.output_ids))
        else:
            same = assert_same_answer(s.output_ids, tokens[: len(s.output_ids)], logits, allowed)
        for i in range(same):
            assert_same(machine.logits[s.sequence_id, i], logits[i], allowed, f"row {s.sequence_id}, token {i}")


# What happens before each step: a row joins, one is cancelled, all are computed again, or nothing.
EVENTS = st.lists(
    st.sampled_from(["join", "join", "step", "step", "step", "cancel", "drop all"]),
    min_size=6,
    max_size=60 if THOROUGH else 24,
)


@settings(max_examples=drawn(12, least=2), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EVENTS, st.permutations(range(len(ROWS))), st.sampled_from([1 << 40, 2.2, 3.0]), st.integers(0, 1 << 32))
def test_every_row_of_a_batch_is_bit_by_bit_what_it_is_alone(kind, alone, events, order, memory, seed):
    model, kv_bits, bound = kind
    rng = random.Random(seed)
    cost = Runner(model, kv_bits).cost
    longest = cost.row_bytes(cost.slabs.capacity_for(200))
    machine = Machine(model, kv_bits, int(memory * longest))
    ready = [rows()[index] for index in order]
    joined, cancelled = [], []
    for event in [*events, *["join"] * len(ready)]:
        if event == "join" and ready:
            joined.append(ready.pop())
            joined[-1].principal, joined[-1].group = rng.choice("pq"), rng.choice("xy")  # whose turn changes no bit
            machine.scheduler.add(joined[-1])
        elif event == "cancel" and len(joined) > len(cancelled) + 1:
            cancelled.append(rng.choice([s for s in joined if s not in cancelled]))
            machine.cancel(cancelled[-1])
        elif event == "drop all":
            machine.drop_all()
        if machine.scheduler.has_work or machine.flight:
            machine.advance(ahead=rng.random() < 0.7)
    machine.run([])
    assert_as_alone(alone, bound, machine, joined)
    assert all(len(s.output_ids) == s.params.max_tokens for s in joined if s not in cancelled)
    assert not machine.failed


def test_a_row_alone_is_what_mlx_lm_itself_computes(kind):
    model, kv_bits, _ = kind
    caches = make_prompt_cache(model)
    if kv_bits:
        caches = [c.to_quantized(group_size=32, bits=kv_bits) for c in caches]
    machine, s = Machine(model, kv_bits), sequence(5, 90, 30)
    machine.run([s])
    for start in range(0, 90, 16):
        logits = model(mx.array([s.prompt_ids[start : min(start + 16, 90)]]), cache=caches)
    for i, token_id in enumerate(s.output_ids):
        assert_same(machine.logits[5, i], logits[0, -1])
        logits = model(mx.array([[token_id]]), cache=caches)


def test_a_preempted_row_goes_on_as_if_nothing_had_been(kind, alone):
    model, kv_bits, bound = kind
    machine = Machine(model, kv_bits)
    two = [rows()[2], rows()[4]]
    for s in two:
        machine.scheduler.add(s)
    for _ in range(35):
        machine.advance()
    assert all(len(s.output_ids) > 10 for s in two)
    machine.drop_all()
    machine.run([])
    assert_as_alone(alone, bound, machine, two)


def test_a_row_that_joins_others_leaves_their_states_as_they_were():
    model = build("mamba2")
    expected = [Machine(model).run([sequence(i, 9, 20)])[0] for i in range(3)]
    machine, rows = Machine(model), [sequence(i, 9, 20) for i in range(3)]
    for s in rows:
        machine.scheduler.add(s)
        for _ in range(3):
            machine.advance()
    machine.run([])
    assert [s.output_ids for s in rows] == expected


@pytest.mark.long
def test_memory_that_runs_out_preempts_and_loses_nothing(llama):
    one = Runner(llama).cost.row_bytes(1024)
    limits = Limits(max_running=4, chunk_tokens=128, prefill_tokens_idle=512, prefill_tokens_busy=128)
    machine = Machine(llama, limit_bytes=int(3.4 * one), limits=limits)
    together = machine.run([sequence(i, 950, 100) for i in range(3)])
    assert machine.again
    assert together == [Machine(llama, limits=limits).run([sequence(i, 950, 100)])[0] for i in range(3)]


def test_a_seed_draws_the_same_text_alone_and_among_others(llama):
    drawn = {"temperature": 1.0, "top_p": 0.9}
    alone = Machine(llama).run([sequence(1, 20, seed=3, **drawn)])[0]
    others = [sequence(0, 9), sequence(2, 40, seed=3, **drawn), sequence(3, 20, seed=4, temperature=2.0, top_k=7)]
    together = Machine(llama).run([others[0], sequence(1, 20, seed=3, **drawn), *others[1:]])
    assert together[1] == alone
    assert together[2] != alone


# Memory


def test_the_bytes_reserved_are_the_bytes_taken(llama):
    machine = Machine(llama)
    for i, n in enumerate((10, 60, 200, 700)):
        machine.scheduler.add(sequence(i, n, 300))
    for _ in range(250):
        machine.advance()
        assert machine.runner.kv_bytes <= machine.scheduler.pool.used_bytes
    assert machine.runner.kv_bytes == machine.scheduler.pool.used_bytes
    assert len({s.slot.capacity for s in machine.scheduler.running}) >= 2


@pytest.mark.parametrize("chunk_tokens", [16, pytest.param(512, marks=pytest.mark.long)])
def test_no_kind_of_layer_takes_more_than_was_reserved(kind, chunk_tokens):
    model, kv_bits, _ = kind
    machine = Machine(model, kv_bits, limits=Limits(6, 9, chunk_tokens, chunk_tokens, chunk_tokens))
    machine.scheduler.add(sequence(9, 1100, 10))
    for i, (num_tokens, _, _) in enumerate(ROWS[:6]):
        machine.scheduler.add(sequence(i, num_tokens, 60))
    for _ in range(70):
        machine.advance()
        assert machine.runner.kv_bytes <= machine.scheduler.pool.used_bytes


def test_padded_rows_that_are_cancelled_take_nothing_while_others_read_their_prompts():
    model = build("deepseek_v3")
    machine, decoding, reading = Machine(model), sequence(1, 60, 200), sequence(2, 400)
    machine.scheduler.add(decoding)
    for _ in range(8):
        machine.advance(ahead=False)
    machine.scheduler.add(reading)
    machine.advance(ahead=False)
    machine.cancel(decoding)
    assert reading.num_computed < 200
    while not reading.output_ids:
        assert machine.runner.kv_bytes <= machine.scheduler.pool.ledger.used_bytes
        machine.advance(ahead=False)


@pytest.mark.usefixtures("cpu_ways")
def test_a_move_that_fails_leaves_no_tensor_behind(llama, monkeypatch):
    machine, calls, copy = Machine(llama), [], FullLayer.copy

    def copy_once(self, *arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        copy(self, *arguments)

    monkeypatch.setattr(FullLayer, "copy", copy_once)
    machine.scheduler.add(sequence(1, 60, 150))
    with pytest.raises(RuntimeError, match="out of memory"):
        machine.run([])
    machine.drop_all()
    assert machine.runner.kv_bytes == machine.scheduler.pool.ledger.used_bytes == 0


def address(array):
    return np.asarray(array).__array_interface__["data"][0]


@pytest.mark.usefixtures("cpu_ways")
@pytest.mark.parametrize("ahead", [False, True])
def test_joining_and_leaving_copies_no_other_row(llama, ahead):
    machine = Machine(llama)
    first, second = sequence(1, 40, 200), sequence(2, 30, 200)
    machine.scheduler.add(first)
    for _ in range(10):
        machine.advance(ahead=ahead)
    (layer, *_) = machine.runner.rows.layers.values()
    ((keys,), (values,)) = layer.slabs[first.slot.slab.slab_id]
    before = address(keys), address(values)
    del keys, values
    machine.scheduler.add(second)
    for _ in range(10):
        machine.advance(ahead=ahead)
    assert second.slot.slab == first.slot.slab
    machine.cancel(first)
    for _ in range(3):
        machine.advance(ahead=ahead)
    ((keys,), (values,)) = layer.slabs[second.slot.slab.slab_id]
    assert (address(keys), address(values)) == before


@pytest.mark.long
def test_a_thousand_cancels_at_random_moments_leave_no_byte_behind(llama):
    rng = random.Random(1)
    one = Runner(llama).cost.row_bytes(128)
    machine, live = Machine(llama, limit_bytes=14 * one), []
    mx.clear_cache()
    before = mx.get_active_memory()
    for number in range(1000):
        live.append(sequence(number, rng.choice((2, 17, 40, 130)), 90, rng.choice("abc")))
        machine.scheduler.add(live[-1])
        for _ in range(rng.randint(0, 2)):
            machine.advance(ahead=rng.random() < 0.7)
        victim = live.pop(rng.randrange(len(live))) if rng.random() < 0.5 or len(live) > 5 else live.pop()
        machine.cancel(victim)
        assert victim.sequence_id not in machine.runner.rows.lengths
        machine.scheduler.check_integrity()
    for s in live:
        machine.cancel(s)
    machine.run([])
    machine.logits.clear()
    mx.clear_cache()
    assert mx.get_active_memory() <= before


# Faults


def poisoned(llama_folder, token_id):
    model, _ = load_model(llama_folder)
    model.model.embed_tokens.weight[token_id] = mx.nan
    return model


def test_a_row_whose_logits_are_no_numbers_fails_alone_and_poisons_no_later_row(tmp_path):
    model = poisoned(make_model(tmp_path), token_id=299)
    good = [sequence(i, 20, 30) for i in range(3)]
    bad = Sequence(9, (5, 299, 7), SamplingParams(10), frozenset())
    for s in good:
        assert 299 not in s.prompt_ids
    expected = [Machine(model).run([sequence(i, 20, 30)])[0] for i in range(3)]
    machine = Machine(model)
    machine.scheduler.add(good[0])
    machine.scheduler.add(bad)
    for _ in range(5):
        machine.advance()
    place = (good[0].slot.slab, 1)
    assert list(machine.failed) == [9]
    for s in good[1:]:
        machine.scheduler.add(s)
    machine.advance()
    machine.advance()
    assert (good[1].slot.slab, good[1].slot.index) == place  # where the broken row was
    machine.run([])
    assert [s.output_ids for s in good] == expected
    assert list(machine.failed) == [9]


@pytest.mark.usefixtures("cpu_ways")
def test_a_row_that_moves_to_where_a_broken_one_was_is_as_it_is_alone(tmp_path):
    model = poisoned(make_model(tmp_path), token_id=299)
    limits = Limits(max_running=4, chunk_tokens=64, prefill_tokens_idle=256, prefill_tokens_busy=256)
    free = {"logit_bias": ((299, -100.0),)}
    (expected,) = Machine(model, limits=limits).run([sequence(2, 60, 150, **free)])
    machine, growing = Machine(model, limits=limits), sequence(2, 60, 150, **free)
    keeper = sequence(0, 180, 76, **free)  # keeps the slab, and makes the run longer than the one that moves
    bad = Sequence(9, (*prompt(1, 100), 299, *prompt(1, 100)), SamplingParams(20), frozenset())
    for s in (keeper, bad, growing):
        machine.scheduler.add(s)
    machine.advance()
    place = bad.slot
    for _ in range(100):
        if growing.slot == place or machine.failed.keys() > {9}:
            break
        machine.advance()
    assert list(machine.failed) == [9]
    assert keeper in machine.scheduler.running
    machine.run([])
    assert growing.output_ids == expected
    assert list(machine.failed) == [9]


def test_a_row_cancelled_before_it_was_found_broken_poisons_no_later_row(tmp_path):
    model = poisoned(make_model(tmp_path), token_id=299)
    expected = Machine(model).run([sequence(1, 20, 30)])
    machine = Machine(model)
    # The keeper is longer than the later row, which is masked where the broken one left no numbers.
    keeper, bad = sequence(0, 60, 60), Sequence(9, (5, 299, 7) * 30, SamplingParams(10), frozenset())
    machine.scheduler.add(keeper)
    machine.scheduler.add(bad)
    while bad.num_computed < 64:
        machine.advance()
    assert not bad.output_ids
    place = bad.slot
    machine.cancel(bad)
    later = sequence(1, 20, 30)
    machine.scheduler.add(later)
    machine.advance()
    machine.advance()
    assert later.slot == place
    machine.run([])
    assert [later.output_ids] == expected
    assert not machine.failed


class Broken:
    awake = True

    def mask(self):
        raise RuntimeError("out of fuel")


class Script:
    """Allows one token at a time, in this order."""

    awake = True

    def __init__(self, tokens):
        self.left, self.taken = list(tokens), []

    def mask(self):
        return (1 << self.left[0]).to_bytes(40, "little")

    def accept(self, token_id):
        self.taken.append(token_id)
        assert token_id == self.left.pop(0)


def test_every_row_obeys_its_own_constraint_token_by_token(llama):
    scripts = [Script(range(start, start + 12)) for start in (10, 50, 90)]
    rows = [sequence(i, 20, temperature=float(i)) for i in range(4)]
    machine = Machine(llama)
    for s, script in zip(rows[1:], scripts, strict=True):
        machine.runner.constrain(s.sequence_id, script)
    free, *told = machine.run(rows)
    assert told == [script.taken for script in scripts] == [[*range(n, n + 12)] for n in (10, 50, 90)]
    assert [free] == Machine(llama).run([sequence(0, 20)])


def test_a_constraint_that_breaks_fails_its_row_alone(llama):
    machine, bad, good = Machine(llama), sequence(1, 20), sequence(2, 20)
    machine.runner.constrain(1, Broken())
    machine.run([bad, good])
    assert machine.failed == {1: "its grammar failed, write it with smaller repetitions: out of fuel"}
    assert [good.output_ids] == Machine(llama).run([sequence(2, 20)])


class Sleeper:
    """Sleeps but for some of the tokens that it hears of, by their numbers; for these it allows number 7 alone."""

    def __init__(self, numbers):
        self.numbers, self.taken = numbers, []

    @property
    def awake(self):
        return len(self.taken) in self.numbers

    def mask(self):
        return (1 << 7).to_bytes(40, "little") if self.awake else None

    def accept(self, token_id):
        self.taken.append(token_id)


@pytest.mark.parametrize("numbers", [{0}, {1}, {5, 6, 7}, {3, 9, 11}])
def test_a_constraint_that_awakes_holds_a_token_that_was_drawn_ahead_of_that(llama, numbers):
    def outputs(ahead):
        machine, rows, num_ahead = Machine(llama), [sequence(i, 20 + i) for i in range(3)], 0
        sleepers = {1: Sleeper(numbers), 2: Sleeper(())}
        for sequence_id, sleeper in sleepers.items():
            machine.runner.constrain(sequence_id, sleeper)
        for s in rows:
            machine.scheduler.add(s)
        while machine.scheduler.has_work:
            machine.advance(ahead)
            num_ahead += machine.flight is not None
        assert [sleepers[i].taken for i in (1, 2)] == [rows[i].output_ids for i in (1, 2)]
        assert not machine.failed
        assert (num_ahead > 0) == ahead
        return [s.output_ids for s in rows]

    free, held, slept = outputs(ahead=True)
    assert {i for i, token_id in enumerate(held) if token_id == 7} == numbers
    assert [free, held, slept] == outputs(ahead=False)
    assert [free, slept] == Machine(llama).run([sequence(0, 20), sequence(2, 22)])


def test_heads_that_no_group_divides_are_refused_with_kv_bits(llama):
    with pytest.raises(ModelError, match=r"cannot be quantized\. .* here they are 16"):
        Runner(llama, kv_bits=8)
