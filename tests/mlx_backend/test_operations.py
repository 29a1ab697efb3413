"""How many operations a step takes on a GPU, beside mlx_lm's BatchGenerator in the same run."""

import pytest
from mlx_lm.utils import load_model

from mlx_mcp.mlx_backend import device
from tests.mlx_backend.operations import of_ours, of_theirs
from tests.models_made import make_model

LAYERS = 5
LENGTHS = {
    "1": ([40], 1.1),
    "4 alike": ([40, 41, 42, 43], 1.1),
    "16 alike": ([40 + i for i in range(16)], 1.1),
    "8 alike and longer": ([470 + i for i in range(8)], 1.1),
    "16 from 20 to 1000 tokens": ([20 + 65 * i for i in range(16)], 1.4),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A llama as small as can be; in float32, since a CPU computes prompts in half precision slowly."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    return load_model(make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS, **sizes))[0]


@pytest.mark.parametrize("rows", LENGTHS)
def test_a_step_takes_about_as_many_operations_as_a_batch_that_is_padded(rows, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    lengths, bound = LENGTHS[rows]
    ours, theirs = of_ours(llama, lengths, tmp_path / "ours"), of_theirs(llama, lengths, tmp_path / "theirs")
    assert theirs.total() > 15 * LAYERS
    assert ours.total() <= bound * theirs.total(), f"{ours.total()} {ours} beside {theirs.total()} {theirs}"


def test_a_temperature_costs_as_many_operations_for_a_row_as_for_sixteen(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    one, many = (of_ours(llama, [40] * n, tmp_path / "graph", temperature=0.8, top_p=0.9) for n in (1, 16))
    assert many.total() <= 1.1 * one.total()
