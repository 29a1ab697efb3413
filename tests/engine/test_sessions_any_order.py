"""Sessions under everything that can befall them, over a runner whose keys and values are its tokens."""

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from mlx_mcp.core.layout import Layout
from tests.effort import THOROUGH, drawn
from tests.engine.machine import SessionMachine
from tests.fakes import STOP_ID, FakeLoader, FakeRunner, FakeStore

LAYOUTS = {
    "every token": Layout(sharing=True),
    "windows": Layout(windows=(6,)),
    "states": Layout(states=True),
    "windows and states": Layout(windows=(6, 3), states=True, sharing=True),
}


@pytest.mark.timeout(900)  # a time-out inside Hypothesis would be taken for a failure, and shrunk
@pytest.mark.parametrize(("ahead", "bits"), [(False, 256), (True, 256), (True, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_bytes", [1 << 30, 600])
@pytest.mark.parametrize("outlives", [False, True], ids=["in memory", "on disk"])
def test_no_order_of_events_mistakes_one_prefix_for_another(layout, kv_bytes, ahead, bits, outlives):
    layout = LAYOUTS[layout]

    class Machine(SessionMachine):
        seen: ClassVar = Counter()
        max_kv_bytes = kv_bytes
        hash_bytes = bits // 8

        def __init__(self):
            store = FakeStore()
            self.open_store = (lambda: store) if outlives else None
            super().__init__()

        def make_loader(self):
            exact = layout.windows or layout.states
            return FakeLoader(FakeRunner(layout=layout, ahead=ahead and not exact), context_tokens=1000)

        def expected(self, model, prompt, output, params, finished):
            if finished and len(output) < params.max_tokens:
                assert output == prompt
            else:
                assert output == (prompt * 100)[: len(output)]

        def check_kept(self, session):
            for block in session.leaf.chain():
                assert block.payload.tokens == block.tokens

    assert STOP_ID not in range(2, 31)
    events = ("repeats", "persisted", "restarts") if outlives else ("repeats", "Finished")
    Machine().story()
    assert [event for event in events if not Machine.seen[event]] == []
    Machine.seen.clear()
    run_state_machine_as_test(Machine, settings=settings(max_examples=drawn(12), stateful_step_count=50, deadline=None))
    if THOROUGH:  # so many orders that chance must have brought these about
        assert [event for event in events if not Machine.seen[event]] == []
