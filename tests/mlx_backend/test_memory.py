"""What a decode step takes on a GPU besides its rows: the temporaries of a layer, since slots are written in place."""

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_mcp.core.scheduler import Limits
from mlx_mcp.mlx_backend import device
from tests.mlx_backend.test_runner import Machine, sequence
from tests.models_made import make_model

pytestmark = pytest.mark.usefixtures("kernels")
LAYERS, TOKENS = 16, 100
LIMITS = Limits(max_running=4, chunk_tokens=512, prefill_tokens_idle=2048, prefill_tokens_busy=512)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_writes_to_the_slots_in_place(tmp_path, monkeypatch, ahead):
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    model, _ = load_model(make_model(tmp_path, num_hidden_layers=LAYERS))
    weights = mx.get_active_memory()
    machine = Machine(model, limits=LIMITS)
    for i in range(4):
        machine.scheduler.add(sequence(i, TOKENS + i, 60, temperature=0.7, presence_penalty=0.5, seed=i))
    while not all(s.decoding for s in machine.scheduler.running) or machine.scheduler.waiting:
        machine.advance(ahead=False)
    for _ in range(5):
        machine.advance(ahead=ahead)
        machine.logits.clear()
        mx.reset_peak_memory()
        machine.advance(ahead=ahead)
        slots = machine.runner.kv_bytes
        besides = mx.get_peak_memory() - weights - slots
        assert besides < slots // LAYERS, f"{besides} bytes besides the slots, of which a layer has {slots // LAYERS}"
