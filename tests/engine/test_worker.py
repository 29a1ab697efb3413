import queue
import threading

import pytest

from mlx_mcp.core.ports import ModelSpec
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.engine.engine import Engine
from mlx_mcp.engine.messages import Cancel, Failed, Find, Load, Loaded, Submit, Token, Unload, Unloaded
from mlx_mcp.engine.worker import EngineThread
from mlx_mcp.errors import EngineDead
from tests.fakes import FakeLoader
from tests.process.windows import wait_until


def started(loader, **options):
    thread = EngineThread(lambda: Engine(loader, Limits(), 1000, 1 << 30), **options)
    events = queue.SimpleQueue()

    def sink(event):
        events.put(event)
        return True

    thread.listen(0, sink)
    thread.send(Load(0, loader.prepare(ModelSpec("tiny", "folder", "/"), print)))
    while not isinstance(events.get(timeout=20), Loaded):
        pass
    return thread, events, sink


def submit(thread, call_id, sink):
    thread.listen(call_id, sink)
    thread.send(Submit(call_id, "tiny", (97, 98), SamplingParams(10**6)))


def find(thread, sink):
    thread.listen(99, sink)
    thread.send(Find(99, "tiny"))


def until(events, kind):
    while not isinstance(event := events.get(timeout=20), kind):
        pass
    return event


def test_who_hears_of_a_change_reads_it_in_the_counts():
    thread, *_ = started(FakeLoader())
    seen = []
    thread.listen(1, lambda event: seen.append((event, thread.stats.models)))  # on the engine's own thread
    thread.send(Unload(1, "tiny"))
    wait_until(lambda: seen)
    assert seen == [(Unloaded(100), ())]
    assert thread.stop(5)


def test_a_cancel_takes_hold_before_the_next_step():
    loader = FakeLoader()
    loader.runner.endless = True
    thread, events, sink = started(loader)
    submit(thread, 1, sink)
    until(events, Token)
    loader.runner.gate.clear()  # the next step is held
    thread.send(Cancel(1))
    steps = len(loader.runner.steps)
    loader.runner.gate.set()
    find(thread, sink)
    until(events, Loaded)
    assert len(loader.runner.steps) <= steps + 1
    assert loader.runner.rows == {}
    assert thread.stop(5)


def test_when_the_thread_dies_every_waiter_hears_it_and_later_sends_are_refused():
    loader = FakeLoader()
    loader.runner.endless = True
    thread, events, sink = started(loader)
    for sequence_id in range(4):
        submit(thread, sequence_id, sink)
    until(events, Token)
    loader.runner.explode = SystemExit("fatal")  # no Exception: nothing but the top of the thread catches it
    failed = [until(events, Failed) for _ in range(4)]
    assert {type(f.error) for f in failed} == {EngineDead}
    assert "fatal" in str(failed[0].error)
    with pytest.raises(EngineDead, match="fatal"):
        find(thread, sink)
    assert loader.closed


def test_an_engine_that_cannot_be_made_fails_the_first_command():
    def make():
        raise OSError("no device")

    thread, events = EngineThread(make), queue.SimpleQueue()
    find(thread, lambda event: events.put(event) or True)
    assert "no device" in str(events.get(timeout=20).error)


def test_stopping_fails_what_runs_lets_go_of_the_loader_and_can_be_repeated():
    loader = FakeLoader()
    loader.runner.endless = True
    thread, events, sink = started(loader)
    submit(thread, 1, sink)
    until(events, Token)
    assert thread.stop(5)
    assert isinstance(until(events, Failed).error, EngineDead)
    assert loader.closed
    assert thread.stop(5)


def test_a_thread_that_was_never_needed_never_starts():
    before = threading.active_count()
    thread = EngineThread(lambda: Engine(FakeLoader(), Limits(), 1000, 1 << 30))
    assert threading.active_count() == before
    assert thread.stop(1)
    with pytest.raises(EngineDead):
        thread.send(Cancel(1))


def test_an_idle_thread_takes_no_steps():
    loader = FakeLoader()
    thread, events, sink = started(loader)
    thread.listen(1, sink)
    thread.send(Submit(1, "tiny", (97,), SamplingParams(2)))
    until(events, Token)
    find(thread, sink)
    until(events, Loaded)
    steps = thread.stats.steps
    find(thread, sink)
    until(events, Loaded)
    assert thread.stats.steps - steps <= 2
    thread.stop(5)


def test_a_step_that_takes_long_is_seen_and_one_that_takes_longer_than_it_may_counts_as_the_threads_death():
    loader = FakeLoader()
    loader.runner.endless = True
    thread, _, sink = started(loader, step_timeout_s=0.2)
    assert thread.dead is None
    loader.runner.gate.clear()
    submit(thread, 1, sink)
    wait_until(lambda: thread.step_s > 0)
    wait_until(lambda: thread.dead is not None)
    assert "step_timeout_s" in str(thread.dead)
    with pytest.raises(EngineDead, match="step_timeout_s"):
        find(thread, sink)
    loader.runner.gate.set()
    thread.stop(5)


def test_a_thread_that_waits_is_at_no_step():
    thread, events, sink = started(FakeLoader())
    find(thread, sink)
    until(events, Loaded)
    wait_until(lambda: thread.step_s == 0)
    thread.stop(5)
