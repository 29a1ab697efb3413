"""How a step's chunks go through the model on a GPU: in few passes, and cut at the places of a CPU's."""

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_mcp.core.steps import Chunk, Step
from mlx_mcp.mlx_backend import device
from mlx_mcp.mlx_backend import runner as runner_module
from mlx_mcp.mlx_backend.runner import Runner
from tests.comparing import assert_same
from tests.mlx_backend.operations import of_graph
from tests.mlx_backend.test_architectures import build
from tests.mlx_backend.test_layers import Table, prompt
from tests.models_made import make_model

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_model(make_model(tmp_path_factory.mktemp("model")))[0]


def use_ways_of(name, monkeypatch):
    monkeypatch.setattr(device, "on_cpu", lambda: name == "CPU")


STEP = (
    Chunk(1, 0, 64, False),
    Chunk(2, 64, 128, False),
    Chunk(1, 64, 128, False),
    Chunk(3, 0, 128, False),
    Chunk(2, 128, 131, True),
    Chunk(4, 0, 60, True),
    Chunk(5, 9, 19, True),
)


def test_a_gpu_reads_a_rows_chunks_in_one_pass_and_with_them_those_of_rows_that_are_equally_long(llama, monkeypatch):
    use_ways_of("GPU", monkeypatch)
    assert Runner(llama).rows.passes(STEP) == [
        [Chunk(1, 0, 128, False), Chunk(3, 0, 128, False)],
        [Chunk(2, 64, 131, True), Chunk(4, 0, 60, True)],  # about equally long
        [Chunk(5, 9, 19, True)],
    ]


def test_a_cpu_reads_each_chunk_by_itself_but_for_the_last_ones(llama, monkeypatch):
    use_ways_of("CPU", monkeypatch)
    assert Runner(llama).rows.passes(STEP) == [
        *([chunk] for chunk in STEP if not chunk.last),
        [STEP[4], STEP[6]],
        [STEP[5]],
    ]


@pytest.mark.parametrize("name", ["gemma3_text", "mamba2"])
def test_rows_with_windows_or_states_are_read_chunk_by_chunk_on_every_device(name, monkeypatch):
    model = build(name)
    for way in ("CPU", "GPU"):
        use_ways_of(way, monkeypatch)
        assert Runner(model).rows.passes(STEP) == [[chunk] for chunk in STEP]


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_what_is_cut_and_drawn_is_the_same_however_many_chunks_are_read_in_a_pass(tmp_path, kv_bits, monkeypatch):
    use_ways_of("GPU", monkeypatch)
    model = load_model(make_model(tmp_path, **({"head_dim": 32} if kv_bits else {})))[0]

    def read(num_chunks):
        table = Table(model, kv_bits)
        some = [table.sequence(i, prompt(i, 200 + 10 * i)) for i in range(3)]
        payloads = table.run(*some, cuts=True, num_chunks=num_chunks, until=3)
        logits = {(s.sequence_id, n): x for (s, n), x in table.logits.items()}
        return payloads, logits, [s.output_ids for s in some]

    (cuts, logits, answers), (its_cuts, its_logits, its_answers) = read(1), read(99)
    assert answers == its_answers
    assert len(cuts) == 12 + 13 + 13
    assert cuts == its_cuts
    for place, each in logits.items():
        assert_same(each, its_logits[place])


def test_four_rows_take_little_more_operations_than_one(llama, monkeypatch, tmp_path):
    """But for the attention and the writes, which are each row's own."""
    use_ways_of("GPU", monkeypatch)

    def operations(num_rows, num_chunks):
        table, counts = Table(llama), []
        some = [table.sequence(i, prompt(i, 300)) for i in range(num_rows)]
        with monkeypatch.context() as patches:
            patches.setattr(
                runner_module,
                "async_eval",
                lambda *arrays: counts.append(of_graph(arrays, tmp_path / "graph")) or mx.async_eval(*arrays),
            )
            chunks = [Chunk(s.sequence_id, 64 * k, 64 * k + 64, False) for k in range(num_chunks) for s in some]
            table.launch(Step(tuple(chunks)))
        return len(counts), sum(each.total() for each in counts)

    (one_pass, one), (row_pass, row), (four_passes, four) = operations(1, 1), operations(1, 4), operations(4, 4)
    assert one_pass == row_pass == four_passes == 1
    assert row <= one + 4
    assert four < 2.5 * one
