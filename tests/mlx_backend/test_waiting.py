"""Who waits for the device: in a step nothing but the read of its tokens. A GPU that is waited for stands still."""

import ast
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model

import mlx_mcp.mlx_backend
from mlx_mcp.core.layout import Part
from mlx_mcp.core.scheduler import Limits
from mlx_mcp.core.sequence import SamplingParams
from mlx_mcp.core.steps import Restore
from mlx_mcp.mlx_backend import device, layers, rows
from mlx_mcp.mlx_backend import runner as runner_module
from mlx_mcp.mlx_backend.sampler import on_host
from tests.effort import drawn
from tests.mlx_backend.test_layers import Table
from tests.mlx_backend.test_runner import Machine, sequence
from tests.models_made import make_model

pytestmark = pytest.mark.usefixtures("kernels")
FOLDER = Path(mlx_mcp.mlx_backend.__file__).parent
WAITING = {"asarray", "array", "eval", "synchronize", "item", "tolist", "tobytes", "from_dlpack"}  # mx.array waits not
# Where something waits for the device, and why it may.
ALLOWED = {
    "layers.KvPayload.pack": "on the thread that writes to disk",
    "loader.MlxLoader.materialise": "while weights are read",
    "loader.put_adapter": "while weights are read",
    "make_rows.make_rows": "once for each model",
    "rows.settle": "on a CPU; on a GPU in a restore of 4096 tokens and more, whose copies take memory",
    "runner.Flight.collect": "bytes of logits that have been read with the tokens",
    "sampler.Drawn.read": "for the tokens, once a step",
    "sampler.Drawn._on_host": "logits that were computed with the tokens",
    "sampler._logprobs": "numpy, of logits that are on the host",
    "sampler.draw": "on a CPU",
    "slotted_rows.SlottedRows._write": "on a CPU",
}
MANY = {  # rows that ask for all that needed the host once
    "warm": {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "with logprobs": {"logprobs": 5},
    "plain": {},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_model(make_model(tmp_path_factory.mktemp("model")))[0]


@pytest.fixture
def gpu_ways(monkeypatch):
    monkeypatch.setattr(device, "on_cpu", lambda: False)


def waiting_in(path):
    """Functions that call what waits for an array, by module and name; mx.array and the like do not."""
    found = set()

    def walk(node, names):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [*names, node.name]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING:
            of = node.func.value
            if not (isinstance(of, ast.Name) and of.id in ("mx", "xp") and node.func.attr == "array"):
                found.add(".".join([path.stem, *names]))
        for child in ast.iter_child_nodes(node):
            walk(child, names)

    walk(ast.parse(path.read_text()), [])
    return found


def test_nothing_waits_for_the_device_but_what_is_listed_here():
    files = [path for path in FOLDER.glob("*.py") if "import mlx.core" in path.read_text()]
    assert set().union(*map(waiting_in, files)) == set(ALLOWED)


@pytest.fixture
def calls(monkeypatch):
    """What is told to compute, and whether the host waits for it."""
    made, wait, go_on = [], mx.eval, mx.async_eval

    def waited(*arrays):
        made.append("eval")
        wait(*arrays)

    def begun(*arrays):
        made.append("async_eval")
        go_on(*arrays)

    monkeypatch.setattr(mx, "eval", waited)
    for module in (runner_module, rows, layers):
        monkeypatch.setattr(module, "async_eval", begun)
    return made


@pytest.mark.usefixtures("gpu_ways")
@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_is_told_to_the_device_in_one_piece_and_waited_for_once(llama, calls, ahead):
    machine = Machine(llama)
    for i, params in enumerate(MANY.values()):
        machine.scheduler.add(sequence(i, 20, 40, **params))
    while not all(s.decoding for s in machine.scheduler.running) or machine.scheduler.waiting:
        machine.advance(ahead=ahead)
    machine.advance(ahead=ahead)
    calls.clear()
    for _ in range(10):
        machine.advance(ahead=ahead)
        assert (machine.flight is not None) == ahead
    assert calls == ["async_eval"] * 10


@pytest.mark.usefixtures("gpu_ways")
def test_prompts_are_read_and_rows_restored_without_a_wait(llama, calls):
    table = Table(llama)
    calls.clear()  # making it waits for a first token
    first = table.sequence(1, range(1, 101))
    table.run(first, until=2)
    payload = table.runner.cut(1, 0, 64, False)
    assert calls
    assert "eval" not in calls
    calls.clear()
    second = table.sequence(2, range(1, 101))
    table.run(second, restores=[Restore(2, (Part(payload, 64),), 64)], until=2)
    assert second.output_ids == first.output_ids
    assert "eval" not in calls


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.just(0.0) | st.floats(0.1, 2),
        "top_p": st.floats(0.1, 1),
        "top_k": st.integers(1, 50),
        "min_p": st.floats(0, 0.5),
        "seed": st.integers(0, 1 << 32),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.just(((5, 3.0), (9, -100.0))),
        "logprobs": st.integers(0, 5),
    },
)


@pytest.mark.usefixtures("gpu_ways")
@settings(max_examples=drawn(8, least=3), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PARAMS, min_size=1, max_size=4))
def test_a_row_draws_the_same_whether_its_steps_run_ahead_or_not(llama, params):
    def answers(ahead):
        machine, some = Machine(llama), [sequence(i, 15 + i, 14, **each) for i, each in enumerate(params)]
        for s in some:
            machine.scheduler.add(s)
        num_ahead = 0
        while machine.scheduler.has_work or machine.flight:
            machine.advance(ahead=ahead)
            num_ahead += machine.flight is not None
        assert (num_ahead > 5) == ahead
        return [s.output_ids for s in some]

    assert answers(True) == answers(False)


@pytest.mark.usefixtures("gpu_ways")
def test_on_a_gpu_no_way_of_drawing_keeps_a_step_from_running_ahead():
    for params in MANY.values():
        assert not on_host(SamplingParams(1, **params))


@pytest.mark.usefixtures("gpu_ways")
def test_a_token_that_nobody_has_read_yet_is_penalised_as_one_that_was_read(llama):
    flat = {"logit_bias": tuple((token, 100.0) for token in (7, 8, 9)), "presence_penalty": 2.0, "seed": 1}
    machine, s = Machine(llama, limits=Limits()), sequence(1, 9, 6, **flat)
    machine.run([s])
    assert len(set(s.output_ids[:3])) == 3
