"""The engine without its thread: each step is taken by hand."""

import random

import pytest

from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.engine.awaited import ModelRoom
from mlx_mcp.engine.engine import Engine, EngineOptions
from mlx_mcp.engine.messages import (
    Cancel,
    EncodeAgain,
    Failed,
    Find,
    Finished,
    Load,
    Loaded,
    Loading,
    Prefilled,
    Submit,
    Token,
    Unloaded,
    Waiting,
)
from mlx_mcp.errors import CapacityError, EngineDead, GenerationFailed, InvalidRequest, ModelError, RequestTooLarge
from tests.engine.hearing import hear
from tests.fakes import FakeLoader


class Events(list):
    """A sink that keeps what it hears; `deaf` says that nobody listens any more."""

    deaf = False

    def __call__(self, event):
        self.append(event)
        return not self.deaf

    @property
    def text(self):
        return "".join(chr(e.token_id) for e in self if isinstance(e, Token))


def load(engine, name="tiny"):
    events = Events()
    prepared = engine.loader.prepare(ModelSpec(name, "folder", "/nowhere"), lambda line: None)
    engine.handle(Load(hear(engine, events), prepared))
    return events


def loaded_engine(max_kv_bytes=1 << 30, **settings):
    options = EngineOptions(block_tokens=min(64, settings.get("chunk_tokens", 64)))
    engine = Engine(FakeLoader(), Limits(**settings), 1000, max_kv_bytes, options)
    load(engine)
    for _ in range(3):
        engine.step()
    assert engine.stats.models == ("tiny",)
    return engine


def submit(engine, sequence_id, text, model="tiny", lane="", group="", **params):
    events = Events()
    prompt_ids = tuple(map(ord, text))
    params = SamplingParams(**{"max_tokens": 50} | params)
    hear(engine, events, sequence_id)
    engine.handle(Submit(sequence_id, model, prompt_ids, params, lane, group=group))
    return events


def run(engine, max_steps=200):
    for _ in range(max_steps):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError(f"still working after {max_steps} steps")


def test_a_sequence_hears_its_wait_its_prefill_its_tokens_and_its_end():
    engine = loaded_engine()
    events = submit(engine, 1, "hi")
    run(engine)
    assert events == [Waiting(0), Prefilled(2), Token(ord("h")), Token(ord("i")), Finished("stop")]
    assert engine.stats.rows == engine.stats.running == 0


def test_many_sequences_answer_at_once_each_its_own():
    engine = loaded_engine()
    answers = {i: submit(engine, i, f"text {i}") for i in range(12)}
    run(engine)
    assert {i: events.text for i, events in answers.items()} == {i: f"text {i}" for i in range(12)}
    assert max(len(step.decode) for step in engine.loader.runner.steps) > 8


def test_a_cancelled_sequence_has_no_row_at_the_next_step():
    engine = loaded_engine()
    events = submit(engine, 1, "abc", max_tokens=1000)
    engine.step()
    assert engine.stats.rows == 1
    engine.handle(Cancel(1))
    assert (engine.stats.rows, engine.stats.running, engine.has_work) == (0, 0, False)
    heard = len(events)
    engine.handle(Cancel(1))
    engine.step()
    assert len(events) == heard


def test_a_sequence_cancelled_while_it_waits_never_runs():
    engine = loaded_engine(max_running=1)
    submit(engine, 1, "ab")
    waiting = submit(engine, 2, "cd")
    assert waiting == [Waiting(1)]
    engine.handle(Cancel(2))
    run(engine)
    assert waiting == [Waiting(1)]


def test_a_listener_that_went_away_frees_its_row():
    engine = loaded_engine()
    events = submit(engine, 1, "abc", max_tokens=1000)
    events.deaf = True
    engine.step()
    assert engine.stats.rows == engine.stats.running == 0


def test_a_broken_row_fails_alone():
    engine = loaded_engine()
    engine.loader.runner.broken.add(ord("x"))
    good, bad = submit(engine, 1, "good"), submit(engine, 2, "x")
    run(engine)
    assert good.text == "good"
    assert isinstance(bad[-1], Failed)
    assert isinstance(bad[-1].error, GenerationFailed)
    assert engine.stats.rows == 0


def test_an_exception_in_a_step_fails_its_rows_and_the_engine_goes_on():
    engine = loaded_engine()
    engine.loader.runner.explode = RuntimeError("boom")
    lost = [submit(engine, i, "text") for i in range(3)]
    engine.step()
    told = "The generation failed: RuntimeError('boom'). Try again"
    assert all(told in str(events[-1].error) for events in lost)
    assert engine.stats.rows == 0
    after = submit(engine, 9, "after")
    run(engine)
    assert after.text == "after"


def test_an_exception_costs_the_sequences_outside_the_step_nothing_but_time():
    engine = loaded_engine(chunk_tokens=4, prefill_tokens_idle=4, prefill_tokens_busy=4)
    inside, outside = submit(engine, 1, "abcdefgh"), submit(engine, 2, "ijklmnop")
    engine.step()  # the first chunk of the one
    engine.step()  # the first of the other
    engine.loader.runner.explode = RuntimeError("boom")
    engine.step()
    assert isinstance(inside[-1], Failed)
    assert engine.stats.rows == engine.stats.kv_reserved_bytes == 0
    run(engine)
    assert outside.text == "ijklmnop"


def test_a_step_that_was_run_ahead_fails_like_any_other():
    engine = loaded_engine()
    engine.loader.runner.ahead = True
    lost = submit(engine, 1, "abcdefgh")
    engine.step()
    engine.loader.runner.explode = RuntimeError("boom")
    engine.step()
    assert isinstance(lost[-1], Failed)
    run(engine)
    assert (engine.stats.rows, engine.stats.kv_reserved_bytes, engine.has_work) == (0, 0, False)
    after = submit(engine, 2, "after")
    run(engine)
    assert after.text == "after"


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_that_come_and_go_while_steps_run_ahead_hear_the_same(ahead):
    engine = loaded_engine(max_running=3)
    engine.loader.runner.ahead = ahead
    answers = {}
    for i in range(8):
        answers[i] = submit(engine, i, "abcdefghij"[: i + 2], max_tokens=3 + i)
        engine.step()
        if i == 4:
            engine.handle(Cancel(2))
    run(engine)
    assert {i: e.text for i, e in answers.items() if i != 2} == {
        i: "abcdefghij"[: i + 2][: 3 + i] for i in range(8) if i != 2
    }
    assert engine.stats.rows == engine.stats.kv_reserved_bytes == 0


def test_a_thousand_cancels_at_random_moments_leave_nothing_behind():
    rng = random.Random(3)
    engine = loaded_engine(
        max_kv_bytes=3000, max_running=6, chunk_tokens=8, prefill_tokens_idle=16, prefill_tokens_busy=8
    )
    engine.loader.runner.endless = True
    live, number = [], 0
    for _ in range(1000):
        engine.loader.runner.ahead = rng.random() < 0.5
        while len(live) < 8:
            number += 1
            submit(engine, number, "x" * rng.randint(1, 300), max_tokens=600, lane=rng.choice("abc"))
            live.append(number)
        for _ in range(rng.randint(0, 3)):
            engine.step()
        victim = live.pop(rng.randrange(len(live)))
        engine.handle(Cancel(victim))
        assert victim not in engine.loader.runner.rows
        engine.models.by_name["tiny"].scheduler.check_integrity()
    for number in live:
        engine.handle(Cancel(number))
    run(engine)
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.rows, stats.kv_reserved_bytes) == (0, 0, 0, 0)
    assert stats.preemptions > 0


def test_a_preempted_sequence_goes_on_where_it_was():
    engine = loaded_engine(max_kv_bytes=3000, chunk_tokens=64, prefill_tokens_idle=64, prefill_tokens_busy=64)
    texts = ["ab" * 475, "cd" * 450]
    answers = [submit(engine, i, text, max_tokens=200) for i, text in enumerate(texts)]
    run(engine, 2000)
    assert engine.stats.preemptions == 1
    assert [a.text for a in answers] == [text[:200] for text in texts]


def test_what_can_never_fit_is_refused_before_it_is_queued():
    engine = loaded_engine(max_kv_bytes=1000)
    events = submit(engine, 1, "x" * 2000)
    assert isinstance(events[-1].error, RequestTooLarge)
    assert not engine.has_work


def test_calls_without_a_session_take_turns_as_sessions_of_their_own():
    engine = loaded_engine(max_running=1)
    for i in range(3):
        submit(engine, i, "a", lane="crowd", max_tokens=1)
    submit(engine, 9, "b", max_tokens=1)
    run(engine)
    assert [step.rows[0] for step in engine.loader.runner.steps] == [0, 9, 1, 2]


def test_a_free_place_goes_to_a_group_that_runs_nothing():
    engine = loaded_engine(max_running=2)
    for i in range(3):
        submit(engine, i, "abc", group="crowd")
    submit(engine, 9, "abc", group="other")
    engine.step()
    assert set(engine.loader.runner.steps[0].rows) == {0, 9}


def test_token_ids_beyond_the_vocabulary_never_reach_the_model():
    engine = loaded_engine()
    events = Events()
    for prompt_ids in ((0x110000,), (-1,), ()):
        engine.handle(Submit(hear(engine, events), "tiny", prompt_ids, SamplingParams(5)))
    params = SamplingParams(5, logit_bias=((0x110000, 1.0),))
    engine.handle(Submit(hear(engine, events), "tiny", (1,), params))
    assert [type(e.error) for e in events] == [InvalidRequest] * 4
    beyond, below, none, biased = (str(e.error) for e in events)
    assert "The tokenizer of 'tiny' gives the token id 1114112, and the model's ids go up to 1114111" in beyond
    assert "token id -1" in below
    assert "no tokens" not in beyond + below + biased
    assert "The prompt has no tokens" in none
    assert "logit_bias has token id 1114112" in biased
    assert engine.loader.runner.steps == []


def test_a_full_queue_refuses_at_once():
    engine = loaded_engine(max_running=1, max_waiting=1)
    first, second, third = (submit(engine, i, "abc") for i in (1, 2, 3))
    assert isinstance(third[-1].error, CapacityError)
    run(engine)
    assert first.text == second.text == "abc"


def test_a_model_loads_a_slice_a_step_while_another_generates():
    engine = loaded_engine()
    answer = submit(engine, 1, "abcdef")
    engine.step()
    events = load(engine, "other")
    before = len(answer.text)
    for _ in range(3):
        engine.step()
    assert [type(e) for e in events] == [Loading, Loading, Loaded]
    assert len(answer.text) == before + 3


def test_two_who_ask_for_one_model_wait_for_one_reading():
    engine = Engine(FakeLoader(), Limits(), max_weights_bytes=1000, max_kv_bytes=1 << 30)
    first, second = load(engine), load(engine)
    for _ in range(3):
        engine.step()
    third = load(engine)
    assert [type(e[-1]) for e in (first, second, third)] == [Loaded] * 3
    assert engine.loader.materialised == ["tiny"]


def test_a_load_that_fails_tells_everyone_and_the_next_one_may_succeed():
    engine = Engine(
        FakeLoader(fail_weights=OSError("disk gone")), Limits(), max_weights_bytes=1000, max_kv_bytes=1 << 30
    )
    events = load(engine)
    engine.step()
    engine.step()
    engine.step()
    assert isinstance(events[-1].error, ModelError)
    assert "disk gone" in str(events[-1].error)
    assert "Call again" in str(events[-1].error)
    engine.loader.fail_weights = None
    again = load(engine)
    run(engine)
    assert isinstance(again[-1], Loaded)


def test_an_idle_model_makes_room_for_another():
    engine = loaded_engine()
    engine.loader.weights_bytes = 950
    events = load(engine, "other")
    run(engine)
    assert isinstance(events[-1], Loaded)
    assert engine.stats.models == ("other",)
    assert submit(engine, 1, "abc") == [EncodeAgain(loaded=False)]


def test_a_model_in_use_is_not_unloaded_and_the_newcomer_waits_until_it_is_idle():
    engine = loaded_engine()
    answer = submit(engine, 1, "abc")
    engine.loader.weights_bytes = 950
    events = load(engine, "other")
    assert events == [Waiting(0, ModelRoom("other"))]
    assert events[0].awaits.words == "for tiny to make room for other"
    run(engine)
    assert answer.text == "abc"
    assert isinstance(events[-1], Loaded)
    assert engine.stats.models == ("other",)


def test_a_model_that_can_never_fit_is_refused_with_the_figures():
    engine = loaded_engine()
    engine.loader.weights_bytes = 2_000_000_000
    events = load(engine, "other")
    assert isinstance(events[-1].error, ModelError)
    assert "take 2.0 GB, more than" in str(events[-1].error)
    assert "GB that models may use. Choose a smaller or more strongly quantized model" in str(events[-1].error)
    assert engine.stats.models == ("tiny",)


def test_find_says_whether_a_model_is_in_memory():
    engine, events = loaded_engine(), Events()
    engine.handle(Find(hear(engine, events), "tiny"))
    engine.handle(Find(hear(engine, events), "other"))
    assert [type(e) for e in events] == [Loaded, Unloaded]


def test_when_all_fails_every_waiter_hears_it():
    engine = loaded_engine()
    heard = [submit(engine, 1, "abc"), submit(engine, 2, "abc"), load(engine, "other")]
    engine.fail_all(EngineDead("test"))
    assert [type(e[-1].error) for e in heard] == [EngineDead] * 3
    assert not engine.has_work


@pytest.mark.parametrize("text", ["a", "abcdefghij" * 30])
def test_prefill_progress_reaches_the_whole_prompt(text):
    engine = loaded_engine(chunk_tokens=16, prefill_tokens_idle=16)
    events = submit(engine, 1, text, max_tokens=1)
    run(engine)
    told = [e.num_tokens for e in events if isinstance(e, Prefilled)]
    assert told == sorted(told)
    assert told[-1] == len(text)
