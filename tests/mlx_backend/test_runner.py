import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_mcp.core.scheduler import Limits, Scheduler
from mlx_mcp.core.sequence import SamplingParams, Sequence
from mlx_mcp.mlx_backend.runner import RowRunner
from tests.models_made import ARCHITECTURES, make_model

LIMITS = Limits(chunk_tokens=16, prefill_tokens_idle=32, prefill_tokens_busy=16)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    return load_model(make_model(tmp_path_factory.mktemp("model"), request.param))[0]


def prompt(index, num_tokens):
    return tuple((31 * index + 7 * i) % 300 for i in range(num_tokens))


def sequence(index, num_tokens, **params):
    return Sequence(index, prompt(index, num_tokens), SamplingParams(**{"max_tokens": 12} | params), frozenset())


def run_all(model, sequences):
    runner, scheduler = RowRunner(model), Scheduler(LIMITS)
    for s in sequences:
        scheduler.add(s)
    while scheduler.has_work:
        step = scheduler.schedule()
        for finished in scheduler.commit(step, runner.run(step).tokens):
            runner.release(finished.sequence_id)
    assert runner.num_rows == 0
    return [s.output_ids for s in sequences]


def test_every_row_of_a_mixed_batch_is_what_it_is_alone(model):
    lengths = [3, 70, 16, 33, 1]
    alone = [run_all(model, [sequence(i, n)])[0] for i, n in enumerate(lengths)]
    together = run_all(model, [sequence(i, n) for i, n in enumerate(lengths)])
    assert together == alone


def test_greedy_rows_take_what_mlx_lm_itself_takes(model):
    ids = prompt(5, 40)
    cache, expected = make_prompt_cache(model), []
    for start in range(0, 40, 16):
        logits = model(mx.array([ids[start : start + 16]]), cache=cache)
    for _ in range(12):
        expected.append(mx.argmax(logits[0, -1]).item())
        logits = model(mx.array([expected[-1:]]), cache=cache)
    assert run_all(model, [sequence(5, 40)]) == [expected]


def test_a_seed_draws_the_same_text_alone_and_among_others(model):
    drawn = {"temperature": 1.0, "top_p": 0.9}
    alone = run_all(model, [sequence(1, 20, seed=3, **drawn)])[0]
    together = run_all(model, [sequence(0, 9), sequence(1, 20, seed=3, **drawn), sequence(2, 20, seed=3, **drawn)])
    assert together[1] == alone
    assert run_all(model, [sequence(1, 20, seed=4, **drawn)])[0] != alone


def test_a_row_whose_logits_are_not_numbers_fails_and_the_others_go_on(tmp_path):
    model = load_model(make_model(tmp_path))[0]
    model.model.embed_tokens.weight[299] = mx.nan
    poisoned = Sequence(1, (299,), SamplingParams(4), frozenset())
    sound = Sequence(2, (5, 6), SamplingParams(4), frozenset())
    runner, scheduler = RowRunner(model), Scheduler(LIMITS)
    for s in (poisoned, sound):
        scheduler.add(s)
    result = runner.run(scheduler.schedule())
    assert list(result.failed) == [1]
    assert list(result.tokens) == [2]


def test_releasing_a_row_frees_its_keys_and_values(model):
    runner, scheduler = RowRunner(model), Scheduler(LIMITS)
    scheduler.add(sequence(1, 5))
    runner.run(scheduler.schedule())
    assert runner.num_rows == 1
    runner.release(1)
    runner.release(1)
    assert runner.num_rows == 0
