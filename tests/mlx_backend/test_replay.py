"""A step is a value: the same steps give the same tokens on another runner of the same model, to the bit."""

import pickle
from functools import partial

import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mcp.core.cache.blocks import BlockPool
from mlx_mcp.core.cache.manager import KvCacheManager
from mlx_mcp.core.cache.prefixes import PrefixCache
from mlx_mcp.core.cache.shared_prefixes import Sharing
from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.core.slots import Ledger, SlotPool
from mlx_mcp.core.steps import Step
from mlx_mcp.mlx_backend.runner import Runner
from tests.mlx_backend.test_architectures import build
from tests.mlx_backend.test_runner import Machine, prompt
from tests.mlx_backend.test_runner import sequence as plain_sequence
from tests.models_made import ARCHITECTURES, make_model

pytestmark = pytest.mark.usefixtures("kernels")
BLOCK, CHUNK = 16, 32
LIMITS = Limits(max_running=3, chunk_tokens=CHUNK, prefill_tokens_idle=64, prefill_tokens_busy=32)


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3_next", "deepseek_v3"])
def model(request, tmp_path_factory):
    if request.param not in ARCHITECTURES:
        return build(request.param)
    return load_model(make_model(tmp_path_factory.mktemp("model"), request.param))[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_model(make_model(tmp_path_factory.mktemp("model")))[0]


class RecordedRunner(Runner):
    """Keeps what it was told, in this order: steps, and the ids of sequences that ended."""

    def __init__(self, model):
        super().__init__(model, chunk_tokens=CHUNK)
        self.log = []

    def launch(self, step):
        self.log.append(step)
        return super().launch(step)

    def release(self, sequence_id):
        self.log.append(sequence_id)
        super().release(sequence_id)


class Recording:
    """A run with a block cache; `drawn` has what each step drew, and from which bits."""

    def __init__(self, model):
        self.runner = RecordedRunner(model)
        ledger, layout = Ledger(1 << 40), self.runner.layout
        slots = SlotPool(ledger, self.runner.cost)
        self.cache = KvCacheManager(
            PrefixCache(BlockPool(ledger, BLOCK)), slots, layout, b"model", CHUNK, Sharing(2, BLOCK)
        )
        self.scheduler = Scheduler(LIMITS, slots, self.cache)
        self.drawn = []
        self.step = self.flight = None

    def add(self, sequence_id, prompt_ids, max_tokens, session="", **params):
        made = SamplingParams(max_tokens, **params)
        s = Sequence(sequence_id, prompt_ids, made, frozenset(), session or str(sequence_id))
        self.scheduler.add(s)
        return s

    def advance(self):
        step, flight = self.step, self.flight
        self.step = self.flight = None
        if flight is None:
            step = self.scheduler.schedule()
            flight = self.runner.launch(step)
        if not any(self.runner.must_wait(i) for i in step.drawing):
            self.step = self.scheduler.schedule_ahead(step)
            self.flight = self.runner.launch(self.step) if self.step else None
        result = flight.collect()
        self.drawn.append(bits(flight, result))
        running = {s.sequence_id: s for s in self.scheduler.running}
        for sequence_id, logits in result.logits.items():
            self.cache.remember(running[sequence_id], logits)
        for sequence_id in self.scheduler.commit(step, result.tokens, result.payloads):
            self.cache.finish(running[sequence_id], partial(self.runner.cut, sequence_id))
            self.scheduler.remove(running[sequence_id])
            self.runner.release(sequence_id)
        self.scheduler.check_integrity()

    def run(self):
        while self.scheduler.has_work or self.flight:
            self.advance()

    @property
    def steps(self):
        return [entry for entry in self.runner.log if isinstance(entry, Step)]


def bits(flight, result):
    """The tokens of a step, and the logits that they were drawn from."""
    logits = [np.asarray(drawn.logits).tobytes() for _, drawn in flight.drawn]
    return result.tokens, [[row.sequence_id for row in rows] for rows, _ in flight.drawn], logits


def replay(model, log):
    """What a fresh runner draws that is told the same."""
    runner, found = Runner(model, chunk_tokens=CHUNK), []
    for entry in log:
        if isinstance(entry, Step):
            flight = runner.launch(entry)
            found.append(bits(flight, flight.collect()))
        else:
            runner.release(entry)
    assert runner.num_rows == runner.kv_bytes == 0
    return found


@pytest.fixture(scope="module")
def recording(model):
    """Forks of one prefix that run ahead, seeds and penalties, an interruption for another session, a prompt again."""
    run, common = Recording(model), prompt(1, 3 * CHUNK)
    run.add(1, common, 2)
    run.run()
    for i in (2, 3, 4):
        run.add(i, (*common, *prompt(i, 3 + 9 * i)), 40, "forks")
    for _ in range(10):
        run.advance()
    run.add(5, prompt(5, 70), 12, temperature=0.9, top_p=0.8, top_k=50, seed=7, logprobs=3)
    run.run()
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    run.add(6, prompt(6, 20), 30, **penalties, logit_bias=((9, 2.0),))
    run.add(7, prompt(7, 90), 30, temperature=1.0, min_p=0.05, seed=8)
    run.add(8, (*common, *prompt(2, 21)), 8)
    run.run()
    return run


def test_the_steps_of_a_run_give_the_same_tokens_on_a_fresh_runner(model, recording):
    steps = recording.steps
    assert any(step.released for step in steps)
    assert any(chunk.start for step in steps for chunk in step.prefill)
    assert any(step.restores for step in steps)
    if recording.runner.layout.sharing:
        assert any(row.prefix for step in steps for row in step.admitted)
    if not (recording.runner.layout.windows or recording.runner.layout.states):
        assert any(each.token is None for step in steps for each in step.decode)
    assert replay(model, recording.runner.log) == recording.drawn


@pytest.mark.long
def test_steps_that_were_pickled_are_the_same_and_give_the_same_tokens(model, recording):
    log = pickle.loads(pickle.dumps(recording.runner.log))
    assert log == recording.runner.log
    assert replay(model, log) == recording.drawn


def test_a_row_ahead_is_fed_its_own_token_whatever_the_order(llama):
    def rows():
        return [plain_sequence(0, 20, 4), plain_sequence(1, 20, 40), plain_sequence(2, 20, 30)]

    machine, (ending, staying, late) = Machine(llama), rows()
    for s in (ending, staying):
        machine.scheduler.add(s)
    while ending.finish_reason is None:
        machine.advance()
    machine.scheduler.add(late)  # takes the place of the one that ended, before the one that stays
    machine.run([])
    assert [s.output_ids for s in (ending, staying, late)] == [Machine(llama).run([s])[0] for s in rows()]
